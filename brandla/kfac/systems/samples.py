"""The gradients of single samples, v = Σ γ aᵀ over the positions of a sample, never formed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from brandla.kfac.values import Gradient, Rows


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

    def products(self, matrix: Gradient) -> Tensor:
        """√N ⟨v, V⟩ of every sample, shape (S,)."""
        by_use: Tensor = _bilinear(self.gradients, matrix, self.inputs)
        by_sample = by_use.reshape(-1, self.number, self.positions).sum((0, 2))
        return by_sample * math.sqrt(self.uses)

    def combined(self, coefficients: Tensor, d_in: int) -> Gradient:
        """√N Σ c v over the samples, for c (S,): a pair, or a matrix (d_out, d_in) where inputs are indices."""
        # Those of samples over all layers have the widest of their dtypes.
        weights = (coefficients * math.sqrt(self.uses)).repeat_interleave(self.positions).to(self.gradients.dtype)
        gradients = (self.gradients * weights[:, None]).mT
        if self.inputs.is_floating_point():
            return gradients, self.inputs.mT
        return gradients.new_zeros(gradients.shape[0], d_in).index_add_(1, self.inputs, gradients)


def _bilinear(gradients: Tensor, matrix: Gradient, inputs: Tensor) -> Tensor:
    """γᵀ V a of every use, shape (*groups, S T)."""
    if isinstance(matrix, Tensor):
        if not inputs.is_floating_point():
            return (gradients * matrix.mT[inputs]).sum(-1)
        return ((gradients @ matrix) * inputs).sum(-1)
    left, right = matrix
    return ((gradients @ left) * (inputs @ right if inputs.is_floating_point() else right[inputs])).sum(-1)
