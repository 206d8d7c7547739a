"""Rank-aware orthonormalisation of tall panels by Cholesky QR with a float64 Gram matrix.

Orthonormal columns come out to working precision whatever the panel: columns that depend on earlier ones, or on the
basis they are split against, become zero columns. Derivation and error bounds: ``docs/orthonormalisation.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brandla_kernels import cholesky_inverse_core, gram, project, refine, residual, rotate

# Squared length that a unit column must keep through the second pass. One that loses more was rounding noise
# inside the span it was to be orthogonal to ("twice is enough").
_SECOND_PASS = 0.25


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
        r = basis.shape[-1]
        rotation = rotation.double()
        panel_rotation = self.transform @ rotation[..., r:, :]
        corrected = without_drift(self.drift, rotation[..., :r, :])
        basis_rotation = corrected - self.overlap @ panel_rotation
        return rotate(basis, self.panel, basis_rotation.to(basis.dtype), panel_rotation.to(basis.dtype))


def split(basis: Tensor, columns: Tensor) -> Split:
    """Split columns A (..., n, k) into their part in the span of an orthonormal U (..., n, r) and the rest."""
    coefficients = project(basis, columns)
    panel, panel_gram = residual(basis, columns, coefficients)
    coefficients = coefficients.double()
    # ‖a_j‖² by Pythagoras, with no pass of its own: a residual is judged against the column it came from.
    length = (coefficients.square().sum(-2) + panel_gram.diagonal(dim1=-2, dim2=-1)).sqrt()
    panel, to_panel, transform, kept = _first_pass(panel, panel_gram, length, basis.shape[-1] + columns.shape[-1])
    refined, overlap, refined_gram = refine(basis, panel, transform.to(panel.dtype))
    overlap = overlap.double()
    first_triangle = kept @ to_panel
    cleaned = refined_gram - overlap.mT @ overlap
    second, _ = cholesky_inverse_core(cleaned, _unit_scale(refined_gram), _SECOND_PASS)
    triangle = second.mT @ cleaned @ first_triangle
    return Split(coefficients + overlap @ first_triangle, triangle, refined, overlap, second, measure_drift(basis))


def measure_drift(basis: Tensor) -> Tensor:
    """Return UᵀU − I in float64, for the eighth of the columns that drifted furthest; 0 elsewhere.

    Each update rounds a little orthogonality away, and what a column of long standing has lost it never gets back by
    itself. The norm of a column shows how far it has drifted; corrected columns fall back behind the others, so every
    column has its turn after a few updates, at an eighth of the cost of a full Gram matrix.
    """
    r = basis.shape[-1]
    if r == 0:
        return basis.new_zeros(*basis.shape[:-1], 0)[..., :0, :].double()
    norms = torch.linalg.vector_norm(basis, dim=-2)
    live = norms > 0.5
    chosen = torch.where(live, (norms - 1).abs(), 0).nan_to_num().topk(-(-r // 8), dim=-1).indices
    picked = torch.take_along_dim(basis, chosen[..., None, :], dim=-1)
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
    panel, to_panel, transform, kept = _first_pass(panel, panel_gram, length, panel.shape[-1])
    nearly = panel @ transform.to(panel.dtype)
    nearly_gram = gram(nearly)
    second, _ = cholesky_inverse_core(nearly_gram, _unit_scale(nearly_gram), _SECOND_PASS)
    triangle = second.mT @ nearly_gram @ kept @ to_panel
    return nearly @ second.to(panel.dtype), triangle.to(panel.dtype)


def _first_pass(panel: Tensor, panel_gram: Tensor, length: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return P′, B, T, R with P = P′ B and P′ ≈ (P′ T) R, where P′ T has nearly orthonormal or zero columns.

    In float32 P′ is P and B = I. A float64 Gram matrix resolves float64 columns only down to √ε of their length, so
    there a shifted Cholesky factor first brings the panel's condition down to 1/√ε (shifted Cholesky QR).
    """
    k = panel.shape[-1]
    eps = torch.finfo(panel_gram.dtype).eps
    identity = torch.eye(k, dtype=panel_gram.dtype, device=panel.device)
    if panel.dtype == panel_gram.dtype:
        unit = torch.where(length > 0, length, 1)
        equilibrated = panel_gram / (unit[..., :, None] * unit[..., None, :])
        factor = torch.linalg.cholesky_ex(equilibrated + 64 * max(k, 1) * eps * identity).L
        to_panel = factor.mT * unit[..., None, :]
        panel = torch.linalg.solve_triangular(to_panel, panel, upper=True, left=False)
        panel_gram = gram(panel)
        length = torch.ones_like(length)
        threshold = 16 * max(k, 1) * eps
    else:
        to_panel = identity
        # Rounding of the projection leaves about √(r + k)·ε of a column that lies inside the span.
        threshold = 64 * width * torch.finfo(panel.dtype).eps ** 2
    transform, _ = cholesky_inverse_core(panel_gram, length, threshold)
    return panel, to_panel, transform, transform.mT @ panel_gram


def _unit_scale(matrix: Tensor) -> Tensor:
    """Scale 1 for columns that hold something, 0 for the ones already cleared."""
    return (matrix.diagonal(dim1=-2, dim2=-1) > 0).to(matrix.dtype)
