"""The gradients of single samples, v = Σ γ aᵀ over the positions of a sample, never formed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from brandla import randomized_svd
from brandla.kfac.values import Gradient, Rows

# Products of uses are formed in chunks of this many entries, or of one sample with all samples.
_CHUNK_ENTRIES = 2**22


class Samples(NamedTuple):
    """S samples of T adjacent positions: inputs a (*groups, S T, d_in) or indices (S T,), and γ (*groups, S T, d_out).

    With N uses, the curvature of a layer is F = N Σ v vᵀ. A ⊗ G equals F in expectation, if the gradients of different
    uses are independent of each other and of the inputs. Several gradients of one sample count as samples, and so does
    each position if calls have different numbers of positions (`Rows`).
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
        # The index −1 is a row of zeros. Its gradient is 0, so any index will do.
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
        """Return samples with ``most`` random entries of a and of γ, scaled to keep inner products on average."""
        generator = torch.Generator(self.gradients.device).manual_seed(seed)
        drawn = [self.inputs, self.gradients]
        for index, side in enumerate(drawn):
            n = side.shape[-1]
            if n > most and side.is_floating_point():
                chosen = torch.randperm(n, generator=generator, device=side.device)[:most]
                drawn[index] = side[..., chosen] * math.sqrt(n / most)
        return self._replace(inputs=drawn[0], gradients=drawn[1])

    def fewer_positions(self, most: int, seed: int) -> Samples:
        """Return samples of ``most`` positions: each projected on the leading singular vectors of γ over positions."""
        most = min(most, self.gradients.shape[-1])
        if most >= self.positions or self.one_hot:
            return self
        left, right = self.by_sample()
        generator = torch.Generator(left.device).manual_seed(seed)
        basis = randomized_svd(left.mT, most, generator=generator).Vh
        inputs, gradients = ((basis @ side).flatten(-3, -2) for side in (right, left))
        return Samples(inputs, gradients, most, self.uses)

    def products(self, matrix: Gradient) -> Tensor:
        """Return √N ⟨v, V⟩ of every sample, shape (S,)."""
        left, right = (None, matrix.mT) if isinstance(matrix, Tensor) else matrix
        entries = right[self.inputs] if self.one_hot else self.inputs @ right
        entries = entries * (self.gradients if left is None else self.gradients @ left)
        return entries.sum(-1).reshape(-1, self.number, self.positions).sum((0, 2)) * math.sqrt(self.uses)

    def combined(self, coefficients: Tensor, d_in: int) -> Gradient:
        """Return √N Σ c v over the samples, for c (S,): a pair, or a matrix (d_out, d_in) if inputs are indices."""
        # Coefficients for several layers have the widest dtype of the layers.
        weights = (coefficients * math.sqrt(self.uses)).repeat_interleave(self.positions).to(self.gradients.dtype)
        gradients = (self.gradients * weights[:, None]).mT
        if not self.one_hot:
            return gradients, self.inputs.mT
        return gradients.new_zeros(gradients.shape[0], d_in).index_add_(1, self.inputs, gradients)

    def gram(self) -> Tensor:
        """Return N ⟨v, v'⟩ of all pairs of samples (S, S), from products of uses, or from the v if that is less work.

        ⟨v, v'⟩ = Σ (a·a')(γ·γ') over the positions of both samples.
        """
        inputs, gradients, positions = self.inputs, self.gradients, self.positions
        d_out, d_in = gradients.shape[-1], inputs.shape[-1]
        if not self.one_hot and positions**2 * (d_in + d_out) > d_in * d_out:
            left, right = self.by_sample()
            v = (left.mT @ right).flatten(-2)
            together: Tensor = (v @ v.mT).reshape(-1, self.number, self.number).sum(0)
            return self.uses * together
        width = positions * max(_CHUNK_ENTRIES // max(positions * gradients.shape[-2], 1), 1)
        chunks = zip(gradients.split(width, -2), inputs.split(width, 0 if self.one_hot else -2), strict=True)
        parts = []
        for some_gradients, some_inputs in chunks:
            products = (some_gradients @ gradients.mT) * _input_products(some_inputs, inputs)
            by_sample = products.reshape(-1, products.shape[-2] // positions, positions, self.number, positions)
            parts.append(by_sample.sum((0, 2, 4)))
        return self.uses * torch.cat(parts)

    def squares(self) -> Tensor:
        """Return N ‖v‖² of every sample, shape (S,)."""
        gradients, inputs = self.by_sample()
        products = (gradients @ gradients.mT) * _input_products(inputs, inputs)
        summed: Tensor = products.sum((-2, -1)).reshape(-1, self.number).sum(0)
        return self.uses * summed


def _input_products(one: Tensor, other: Tensor) -> Tensor:
    """Return a·a' for all a in ``one`` and a' in ``other``; for indices it is 1 if they are equal, else 0."""
    return one @ other.mT if one.is_floating_point() else one[..., :, None] == other[..., None, :]
