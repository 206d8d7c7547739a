"""ρ M̂ + w A Aᵀ written in an orthonormal basis that contains both: the step that every symmetric update shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brandla._sharded import WHOLE, Rows
from brandla._split import Split, split
from brandla_kernels import Tall, tall


class Expansion(NamedTuple):
    """A matrix B K Bᵀ with orthonormal B = [U Q], or B = I where [U Q] would have n columns or more."""

    core: Tensor  # K [..., m, m], float64, symmetric to rounding
    basis: Tall
    parts: Split | None
    rows: Rows

    def rotate(self, rotation: Tensor) -> Tall:
        """Return B W for W (..., m, s), in the dtype of U."""
        if self.parts is None:
            return self.rows.own(rotation).to(tall.dtype_of(self.basis))
        return self.parts.rotate(self.basis, rotation)

    def rotate_(self, rotation: Tensor) -> None:
        """Overwrite U with B W, for W (..., m, r)."""
        if self.parts is not None:
            self.parts.rotate_(self.basis, rotation)
        elif isinstance(self.basis, Tensor):
            self.basis.copy_(self.rows.own(rotation))


def expand(
    core: Tensor, basis: Tall, columns: Tall, decay: float | Tensor, weight: float | Tensor, rows: Rows = WHOLE
) -> Expansion:
    """Expand ``decay * U S Uᵀ + weight * A Aᵀ``.

    Parameters
    ----------
    core
        S as a matrix (..., r, r) or, where diagonal, as its diagonal (..., r).
    basis, columns
        U (..., n, r), A (..., n, k); lists of matrices with r + k < n, then S and the numbers are stacked.
    decay, weight
        Numbers or tensors of batch shape.
    rows
        Which rows of the tall matrices these are.
    """
    diagonal = core.ndim < (3 if isinstance(basis, list) else basis.ndim)
    old = (torch.diag_embed(core) if diagonal else core).double() * _over_matrix(decay)
    if not isinstance(basis, list) and basis.shape[-1] + columns.shape[-1] >= rows.count(basis):
        wide, data = rows.gathered(basis).double(), rows.gathered(columns).double()
        return Expansion(wide @ old @ wide.mT + (data * _over_matrix(weight)) @ data.mT, basis, None, rows)
    r = tall.columns(basis)
    parts = split(basis, columns, rows)
    stacked = torch.cat([parts.coefficients, parts.triangle], dim=-2)
    expanded = (stacked * _over_matrix(weight)) @ stacked.mT
    expanded[..., :r, :r] += old
    return Expansion(expanded, basis, parts, rows)


def _over_matrix(value: float | Tensor) -> float | Tensor:
    return value[..., None, None].double() if isinstance(value, Tensor) else value
