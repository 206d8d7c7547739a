"""The gradients of single samples, v = Σ γ aᵀ over the positions of a sample, never formed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from brandla import randomized_svd
from brandla.kfac.values import Gradient, Rows

# Products of uses are formed so many numbers at a time, or for one sample with all.
_AT_ONCE = 2**22


class Samples(NamedTuple):
    """Sample by sample, uses by position: inputs a (*groups, S T, d_in) or indices (S T,), and γ (*groups, S T, d_out).

    With N uses the curvature of a layer is F = N Σ v vᵀ, of which A ⊗ G is the Kronecker form: equal in expectation
    where the gradients of different uses are independent of each other, and of the inputs. Several gradients
    of one sample count as samples.
    """

    inputs: Tensor
    gradients: Tensor
    positions: int
    uses: int

    @classmethod
    def of(cls, rows: Rows) -> Samples:
        """Pair each gradient with its input."""
        if rows.single:
            return cls(rows.inputs, torch.ones_like(rows.inputs[..., :1]), rows.positions, rows.uses)
        if rows.share is not None:
            rows = rows._replace(gradients=rows.gradients * rows.share.sqrt())
        # A row of zeros, which has a gradient of zeros, is at no index.
        inputs = rows.inputs if rows.inputs.is_floating_point() else rows.inputs.clamp_min(0)
        axis = -2 if inputs.is_floating_point() else 0
        draws = rows.gradients.shape[-2] // max(inputs.shape[axis], 1)
        if draws > 1:
            inputs = torch.cat([inputs] * draws, dim=axis)
        return cls(inputs, rows.gradients, rows.positions, rows.uses)

    @property
    def number(self) -> int:
        """S, the number of samples."""
        return self.gradients.shape[-2] // self.positions

    @property
    def one_hot(self) -> bool:
        """Whether inputs are indices."""
        return not self.inputs.is_floating_point()

    def by_sample(self) -> tuple[Tensor, Tensor]:
        """Return γ (*groups, S, T, d_out) and a (*groups, S, T, d_in), or indices (S, T)."""
        axis = 0 if self.one_hot else -2
        return self.gradients.unflatten(-2, (-1, self.positions)), self.inputs.unflatten(axis, (-1, self.positions))

    def some_features(self, most: int, seed: int) -> Samples:
        """Return samples whose a and γ have ``most`` entries, drawn and scaled to right inner products on average."""
        generator = torch.Generator(self.gradients.device).manual_seed(seed)
        drawn = [self.inputs, self.gradients]
        for index, side in enumerate(drawn):
            n = side.shape[-1]
            if n > most and side.is_floating_point():
                chosen = torch.randperm(n, generator=generator, device=side.device)[:most]
                drawn[index] = side[..., chosen] * math.sqrt(n / most)
        return self._replace(inputs=drawn[0], gradients=drawn[1])

    def cut(self, most: int, seed: int) -> Samples:
        """Return samples of ``most`` positions: each turned to the leading singular vectors of its γ over positions."""
        most = min(most, self.gradients.shape[-1])
        if most >= self.positions or self.one_hot:
            return self
        left, right = self.by_sample()
        generator = torch.Generator(left.device).manual_seed(seed)
        turn = randomized_svd(left.mT, most, generator=generator).Vh
        inputs, gradients = ((turn @ side).flatten(-3, -2) for side in (right, left))
        return Samples(inputs, gradients, most, self.uses)

    def products(self, matrix: Gradient) -> Tensor:
        """√N ⟨v, V⟩ of every sample, shape (S,)."""
        left, right = (None, matrix.mT) if isinstance(matrix, Tensor) else matrix
        entries = right[self.inputs] if self.one_hot else self.inputs @ right
        entries = entries * (self.gradients if left is None else self.gradients @ left)
        return entries.sum(-1).reshape(-1, self.number, self.positions).sum((0, 2)) * math.sqrt(self.uses)

    def combined(self, coefficients: Tensor, d_in: int) -> Gradient:
        """√N Σ c v over the samples, for c (S,): a pair, or a matrix (d_out, d_in) where inputs are indices."""
        # Those of samples over all layers have the widest of their dtypes.
        weights = (coefficients * math.sqrt(self.uses)).repeat_interleave(self.positions).to(self.gradients.dtype)
        gradients = (self.gradients * weights[:, None]).mT
        if not self.one_hot:
            return gradients, self.inputs.mT
        return gradients.new_zeros(gradients.shape[0], d_in).index_add_(1, self.inputs, gradients)

    def gram(self) -> Tensor:
        """N ⟨v, v'⟩ of all pairs of samples (S, S): from products of uses, or from the v where those are fewer numbers.

        ⟨v, v'⟩ = Σ (a·a')(γ·γ') over the positions of both samples.
        """
        inputs, gradients, positions = self.inputs, self.gradients, self.positions
        d_out, d_in = gradients.shape[-1], inputs.shape[-1]
        if not self.one_hot and positions**2 * (d_in + d_out) > d_in * d_out:
            left, right = self.by_sample()
            v = (left.mT @ right).flatten(-2)
            together: Tensor = (v @ v.mT).reshape(-1, self.number, self.number).sum(0)
            return self.uses * together
        width = positions * max(_AT_ONCE // max(positions * gradients.shape[-2], 1), 1)
        parts = []
        for own, of_inputs in zip(
            gradients.split(width, -2), inputs.split(width, 0 if self.one_hot else -2), strict=True
        ):
            products = (own @ gradients.mT) * _products(of_inputs, inputs)
            by_sample = products.reshape(-1, products.shape[-2] // positions, positions, self.number, positions)
            parts.append(by_sample.sum((0, 2, 4)))
        return self.uses * torch.cat(parts)

    def squares(self) -> Tensor:
        """N ‖v‖² of every sample, shape (S,)."""
        gradients, inputs = self.by_sample()
        products = (gradients @ gradients.mT) * _products(inputs, inputs)
        summed: Tensor = products.sum((-2, -1)).reshape(-1, self.number).sum(0)
        return self.uses * summed


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Return a·a' of all of one and all of the other, which of indices is 1 where they are equal."""
    return one @ other.mT if one.is_floating_point() else one[..., :, None] == other[..., None, :]
