"""Rank-aware orthonormalisation of tall panels by Cholesky QR with a float64 Gram matrix.

Orthonormal columns come out to working precision whatever the panel: columns that depend on earlier ones, or on the
basis they are split against, become zero columns. Derivation and error bounds: ``docs/orthonormalisation.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brandla_kernels import cholesky_inverse_core, gram, project, reads_are_free, refine, residual, rotate, rotate_

# Squared length that a unit column must keep through the second pass. One that loses more was rounding noise
# inside the span it was to be orthogonal to ("twice is enough").
_SECOND_PASS = 0.25
# Rows squared at a time, so that no second copy of a basis is made.
_ROWS = 4096


class Split(NamedTuple):
    """A = U C + Q R with Q orthonormal (or zero) columns, orthogonal to U; Q itself is never formed.

    Q = (Q₁ − U C₂) T₂, where Q₁ (..., n, k) is the only new tall matrix.
    """

    coefficients: Tensor  # C   [..., r, k], float64
    triangle: Tensor  # R       [..., k, k], float64
    panel: Tensor  # Q₁         [..., n, k], dtype of A
    overlap: Tensor  # C₂       [..., r, k], float64
    transform: Tensor  # T₂     [..., k, k], float64
    drift: Tensor  # UᵀU − I    [..., r, r], float64, in the columns that drifted most

    def rotate(self, basis: Tensor, rotation: Tensor) -> Tensor:
        """Return [U Q] W for W (..., r + k, s), in one pass over U and Q₁, with the drift of U taken out."""
        return rotate(basis, self.panel, *self._rotations(basis, rotation))

    def rotate_(self, basis: Tensor, rotation: Tensor) -> None:
        """Overwrite U with [U Q] W, for W (..., r + k, r)."""
        rotate_(basis, self.panel, *self._rotations(basis, rotation))

    def _rotations(self, basis: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Return what U and Q₁ are multiplied by, for [U Q] W."""
        r, dtype = basis.shape[-1], basis.dtype
        rotation = rotation.to(dtype)
        panel_rotation = self.transform.to(dtype) @ rotation[..., r:, :]
        corrected = without_drift(self.drift.to(dtype), rotation[..., :r, :])
        return corrected - self.overlap.to(dtype) @ panel_rotation, panel_rotation


def split(basis: Tensor, columns: Tensor) -> Split:
    """Split columns A (..., n, k) into their part in the span of an orthonormal U (..., n, r) and the rest."""
    coefficients = project(basis, columns)
    panel, panel_gram = residual(basis, columns, coefficients)
    coefficients = coefficients.double()
    # ‖a_j‖² by Pythagoras, with no pass of its own: a residual is judged against the column it came from.
    length = (coefficients.square().sum(-2) + panel_gram.diagonal(dim1=-2, dim2=-1)).sqrt()
    first = _first_pass(panel, panel_gram, length, basis.shape[-1] + columns.shape[-1])
    drift = measure_drift(basis)
    if reads_are_free(panel) and _needs_no_second_pass(panel_gram, length, first):
        overlap = _overlap(basis, length, first)
        inside = overlap if first.to_panel is None else overlap @ first.to_panel
        return Split(coefficients + inside, first.triangle(), first.panel, overlap, first.transform, drift)
    refined, overlap, refined_gram = refine(basis, first.panel, first.transform.to(panel.dtype))
    overlap = overlap.double()
    first_triangle = first.triangle()
    cleaned = refined_gram - overlap.mT @ overlap
    second, _ = cholesky_inverse_core(cleaned, _unit_scale(refined_gram), _SECOND_PASS)
    triangle = second.mT @ cleaned @ first_triangle
    return Split(coefficients + overlap @ first_triangle, triangle, refined, overlap, second, drift)


def measure_drift(basis: Tensor) -> Tensor:
    """Return UᵀU − I in float64, for the eighth of the columns that drifted furthest; 0 elsewhere.

    Each update rounds a little orthogonality away, and what a column of long standing has lost it never gets back by
    itself. The norm of a column shows how far it has drifted; corrected columns fall back behind the others, so every
    column has its turn after a few updates, at an eighth of the cost of a full Gram matrix.
    """
    r = basis.shape[-1]
    if r == 0:
        return basis.new_zeros(*basis.shape[:-1], 0)[..., :0, :].double()
    norms = sum((slab.square().sum(-2) for slab in basis.split(_ROWS, dim=-2)), basis.new_zeros(())).sqrt()
    live = norms > 0.5
    chosen = torch.where(live, (norms - 1).abs(), 0).nan_to_num().topk(-(-r // 8), dim=-1).indices
    picked = basis.index_select(-1, chosen) if basis.ndim == 2 else basis.take_along_dim(chosen[..., None, :], dim=-1)
    identity = torch.diag_embed(live.double())
    index = chosen[..., None, :].expand(*basis.shape[:-2], r, chosen.shape[-1])
    deviation = project(basis, picked).double() - identity.gather(-1, index)
    drift = torch.zeros_like(identity).scatter(-1, index, deviation)
    return drift.scatter(-2, index.mT, deviation.mT)


def without_drift(drift: Tensor, rotation: Tensor) -> Tensor:
    """Return (I − E/2) W: to first order, the rotation of U (I + E)^(−1/2), which is orthonormal again."""
    return rotation - drift @ rotation / 2


def orthonormalize(panel: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R with P = Q R, where Q has orthonormal columns, or zero ones where the rank of P runs out.

    Equivalent to ``torch.linalg.qr`` in exact arithmetic and full rank, with matrix products and Cholesky
    factorisations of order k only: 6nk² flops and no host sync.

    Parameters
    ----------
    panel
        P, shape (..., n, k), float32 or float64.

    Returns
    -------
    tuple
        Q, shape (..., n, k), and R, shape (..., k, k), in the dtype of P. R is upper triangular in its live rows.
    """
    panel_gram = gram(panel)
    length = panel_gram.diagonal(dim1=-2, dim2=-1).sqrt()
    first = _first_pass(panel, panel_gram, length, panel.shape[-1])
    nearly = first.panel @ first.transform.to(panel.dtype)
    nearly_gram = gram(nearly)
    second, _ = cholesky_inverse_core(nearly_gram, _unit_scale(nearly_gram), _SECOND_PASS)
    triangle = second.mT @ nearly_gram @ first.triangle()
    return nearly @ second.to(panel.dtype), triangle.to(panel.dtype)


class _FirstPass(NamedTuple):
    """P = P′ B and P′ ≈ (P′ T) R, where the columns of P′ T are nearly orthonormal, or zero."""

    panel: Tensor  # P′         [..., n, k]
    gram: Tensor  # P′ᵀP′       [..., k, k], float64
    transform: Tensor  # T      [..., k, k], float64
    to_panel: Tensor | None  # B, upper triangular; None stands for I

    def triangle(self) -> Tensor:
        """R B, so that P ≈ (P′ T) R B."""
        triangle = self.transform.mT @ self.gram
        return triangle if self.to_panel is None else triangle @ self.to_panel


def _first_pass(panel: Tensor, panel_gram: Tensor, length: Tensor, width: int) -> _FirstPass:
    """Orthonormalise a panel as far as its Gram matrix allows.

    A float64 Gram matrix resolves float64 columns only down to √ε of their length, so there a shifted Cholesky factor
    first brings the panel's condition down to 1/√ε (shifted Cholesky QR).
    """
    eps = torch.finfo(panel.dtype).eps
    if panel.dtype != panel_gram.dtype:
        # Rounding of the projection leaves about √(r + k)·ε of a column that lies inside the span.
        transform, _ = cholesky_inverse_core(panel_gram, length, 64 * width * eps**2)
        return _FirstPass(panel, panel_gram, transform, None)
    k = max(panel.shape[-1], 1)
    unit = torch.where(length > 0, length, 1)
    equilibrated = panel_gram / (unit[..., :, None] * unit[..., None, :])
    identity = torch.eye(panel.shape[-1], dtype=panel_gram.dtype, device=panel.device)
    to_panel = torch.linalg.cholesky_ex(equilibrated + 64 * k * eps * identity).L.mT * unit[..., None, :]
    panel = torch.linalg.solve_triangular(to_panel, panel, upper=True, left=False)
    panel_gram = gram(panel)
    transform, _ = cholesky_inverse_core(panel_gram, torch.ones_like(length), 16 * k * eps)
    return _FirstPass(panel, panel_gram, transform, to_panel)


def _needs_no_second_pass(panel_gram: Tensor, length: Tensor, first: _FirstPass) -> bool:
    """Say whether one pass is as good as two: no column lost 99 % of its length, and none leans on the others.

    Rounding then enters Q at most four times magnified, by T, and a hundred times through what U still shares with P,
    which is measured and taken out.
    """
    left = panel_gram.diagonal(dim1=-2, dim2=-1) >= 1e-4 * length.square()
    own = first.gram.diagonal(dim1=-2, dim2=-1)
    return bool(left.all()) and _magnifies_little(own, first.transform)


def _overlap(basis: Tensor, length: Tensor, first: _FirstPass) -> Tensor:
    """UᵀP′ (..., r, k), or 0 where the rounding of the projection reaches Q at most four times magnified."""
    if first.to_panel is None and _magnifies_little(length.square(), first.transform):
        return basis.new_zeros(*basis.shape[:-2], basis.shape[-1], length.shape[-1], dtype=torch.float64)
    return project(basis, first.panel).double()


def _magnifies_little(squares: Tensor, transform: Tensor) -> bool:
    """Say whether T makes errors of these squared lengths in the columns at most four times larger."""
    return bool(((squares[..., :, None] * transform.square()).sum(-2) <= 16).all())


def _unit_scale(matrix: Tensor) -> Tensor:
    """Scale 1 for columns that hold something, 0 for the ones already cleared."""
    return (matrix.diagonal(dim1=-2, dim2=-1) > 0).to(matrix.dtype)
