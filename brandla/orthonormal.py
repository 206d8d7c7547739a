"""Rank-aware orthonormalisation of tall panels by Cholesky QR with a float64 Gram matrix.

Orthonormal columns come out to working precision whatever the panel: columns that depend on earlier ones, or on the
basis they are split against, become zero columns. Derivation and error bounds: ``docs/orthonormalisation.md``.

Tall matrices are one, a batch, or a list with different n (`brandla_kernels.tall`); what belongs to a list is stacked.
They may be some of the rows of larger ones: ``rows.total`` makes an inner product over all rows of one over these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from brandla._sharded import WHOLE, Rows
from brandla_kernels import (
    Tall,
    cholesky_inverse_core,
    gram,
    project,
    reads_are_free,
    refine,
    residual,
    rotate,
    rotate_,
    rounded_gram,
    subtract_product,
    tall,
)

# Squared length that a unit column must keep through the second pass. One that loses more was rounding noise
# inside the span it was to be orthogonal to ("twice is enough").
_SECOND_PASS = 0.25
# Columns up to which a float64 Gram matrix, which two passes need, is cheap enough to begin with.
_NARROW = 32
# Rows squared at a time, so that no second copy of a basis is made.
_ROWS = 4096


class Split(NamedTuple):
    """A = U C + Q R with Q orthonormal (or zero) columns, orthogonal to U; Q itself is never formed.

    Q = (Q₁ − U C₂) T₂, where Q₁ (..., n, k) is the only new tall matrix.
    """

    coefficients: Tensor  # C   [..., r, k], float64
    triangle: Tensor  # R       [..., k, k], float64
    panel: Tall  # Q₁       [..., n, k], dtype of A
    overlap: Tensor  # C₂       [..., r, k], float64
    transform: Tensor  # T₂     [..., k, k], float64
    drift: Tensor  # UᵀU − I    [..., r, r], float64, in the columns that drifted most

    def rotate(self, basis: Tall, rotation: Tensor) -> Tall:
        """Return [U Q] W for W (..., r + k, s), in one pass over U and Q₁, with the drift of U taken out."""
        return rotate(basis, self.panel, *self._rotations(basis, rotation))

    def rotate_(self, basis: Tall, rotation: Tensor) -> None:
        """Overwrite U with [U Q] W, for W (..., r + k, r)."""
        rotate_(basis, self.panel, *self._rotations(basis, rotation))

    def _rotations(self, basis: Tall, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Return what U and Q₁ are multiplied by, for [U Q] W."""
        r, dtype = tall.columns(basis), tall.dtype_of(basis)
        rotation = rotation.to(dtype)
        panel_rotation = self.transform.to(dtype) @ rotation[..., r:, :]
        corrected = without_drift(self.drift.to(dtype), rotation[..., :r, :])
        return corrected - self.overlap.to(dtype) @ panel_rotation, panel_rotation


def split(basis: Tall, columns: Tall, rows: Rows = WHOLE) -> Split:
    """Split columns A (..., n, k) into their part in the span of an orthonormal U (..., n, r) and the rest."""
    coefficients = rows.total(project(basis, columns))
    if reads_are_free(coefficients):
        panel = _each(subtract_product, columns, basis, coefficients)
        exact = tall.columns(panel) <= _NARROW
        panel_gram = rows.total(gram(panel) if exact else _stacked(_each(rounded_gram, panel)))
        easy = _one_pass(basis, coefficients.double(), panel, panel_gram, rows)
        if easy is not None:
            return easy
        panel_gram = panel_gram if exact else rows.total(gram(panel))
    else:
        panel, panel_gram = residual(basis, columns, coefficients)
        panel_gram = rows.total(panel_gram)
    return _two_passes(basis, coefficients.double(), panel, panel_gram, rows)


def _one_pass(basis: Tall, coefficients: Tensor, panel: Tall, panel_gram: Tensor, rows: Rows) -> Split | None:
    """Split where one pass is as good as two: no column lost 99 % of its length, and none leans on the others.

    Rounding then enters Q at most four times magnified, by T, and that of a Gram matrix of rounded products sixteen
    times; and a hundred times through what U still shares with P, which is measured and taken out.
    """
    squares = panel_gram.diagonal(dim1=-2, dim2=-1)
    length = (coefficients.square().sum(-2) + squares).sqrt()
    if not bool((squares > 1e-4 * length.square()).all()):
        return None
    unit = squares.rsqrt()
    factor, info = torch.linalg.cholesky_ex(panel_gram * unit[..., :, None] * unit[..., None, :])
    identity = torch.eye(squares.shape[-1], dtype=squares.dtype)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    if not bool((info == 0).all() and (inverse.square().sum(-1) <= 16).all()):
        return None
    transform, triangle = inverse.mT * unit[..., :, None], factor.mT / unit[..., None, :]
    overlap = _overlap(basis, length, panel, transform, rows)
    return Split(coefficients + overlap, triangle, panel, overlap, transform, measure_drift(basis, rows))


def _two_passes(basis: Tall, coefficients: Tensor, panel: Tall, panel_gram: Tensor, rows: Rows) -> Split:
    """Split whatever the columns are: the second pass orthogonalises what the first left."""
    # ‖a_j‖² by Pythagoras, with no pass of its own: a residual is judged against the column it came from.
    length = (coefficients.square().sum(-2) + panel_gram.diagonal(dim1=-2, dim2=-1)).sqrt()
    first = _first_pass(panel, panel_gram, length, tall.columns(basis) + tall.columns(panel), rows)
    refined, overlap, refined_gram = refine(basis, first.panel, first.transform.to(tall.dtype_of(panel)))
    overlap, refined_gram = rows.totals(overlap.double(), refined_gram)
    first_triangle = first.triangle()
    cleaned = refined_gram - overlap.mT @ overlap
    second, _ = cholesky_inverse_core(cleaned, _unit_scale(refined_gram), _SECOND_PASS)
    triangle = second.mT @ cleaned @ first_triangle
    coefficients = coefficients + overlap @ first_triangle
    return Split(coefficients, triangle, refined, overlap, second, measure_drift(basis, rows))


def measure_drift(basis: Tall, rows: Rows = WHOLE) -> Tensor:
    """Return UᵀU − I in float64, for the eighth of the columns that drifted furthest; 0 elsewhere.

    Each update rounds a little orthogonality away, and what a column of long standing has lost it never gets back by
    itself. The norm of a column shows how far it has drifted; corrected columns fall back behind the others, so every
    column has its turn after a few updates, at an eighth of the cost of a full Gram matrix. For a list on a GPU, or
    sharded, where launches and messages count for more than products, all columns are measured.
    """
    r = tall.columns(basis)
    if not isinstance(basis, Tensor) and not (rows is WHOLE and reads_are_free(basis[0])):
        inner = rows.total(project(basis, basis)).double()
        return inner - torch.diag_embed((inner.diagonal(dim1=-2, dim2=-1) > 0.25).double())
    norms = rows.total(_stacked(_each(_squared_lengths, basis))).sqrt()
    live = norms > 0.5
    identity = torch.diag_embed(live.double())
    if r == 0:
        return identity
    chosen = torch.where(live, (norms - 1).abs(), 0).nan_to_num().topk(-(-r // 8), dim=-1).indices
    index = chosen[..., None, :].expand(*norms.shape, chosen.shape[-1])
    inner = rows.total(project(basis, _each(columns_at, basis, chosen))).double()
    deviation = inner - identity.gather(-1, index)
    drift = torch.zeros_like(identity).scatter_(-1, index, deviation)
    return drift.scatter_(-2, index.mT, deviation.mT)


def _squared_lengths(basis: Tensor) -> Tensor:
    """Return ‖u_j‖² (..., r), a slab of rows at a time."""
    slabs = [slab.square().sum(-2) for slab in basis.split(_ROWS, dim=-2)]
    return slabs[0] if len(slabs) == 1 else torch.stack(slabs).sum(0)


def columns_at(matrix: Tensor, index: Tensor) -> Tensor:
    """Return the columns of a matrix (..., m, n) at the indices (..., p)."""
    if matrix.ndim == 2:
        # Many times faster than the general form.
        return matrix.index_select(-1, index)
    return matrix.take_along_dim(index[..., None, :], dim=-1)


def without_drift(drift: Tensor, rotation: Tensor) -> Tensor:
    """Return (I − E/2) W: to first order, the rotation of U (I + E)^(−1/2), which is orthonormal again."""
    return rotation - drift @ rotation / 2


def orthonormalize(panel: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R with P = Q R, where Q has orthonormal columns, or zero ones where the rank of P runs out.

    Equivalent to ``torch.linalg.qr`` in exact arithmetic and full rank, with matrix products and Cholesky
    factorisations of order k only: 8nk² flops and no host sync.

    Parameters
    ----------
    panel
        P, shape (..., n, k), float32 or float64.

    Returns
    -------
    tuple
        Q, shape (..., n, k), and R, shape (..., k, k), in the dtype of P. R is upper triangular in its live rows.
    """
    nearly, transform, triangle = factorize(panel)
    return nearly @ transform, triangle


def factorize(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return P′, T and R with Q = P′ T, so that a product Q W costs no more than P′ (T W); see `orthonormalize`."""
    panel_gram = gram(panel)
    length = panel_gram.diagonal(dim1=-2, dim2=-1).sqrt()
    first = _first_pass(panel, panel_gram, length, panel.shape[-1], WHOLE)
    nearly = first.panel @ first.transform.to(panel.dtype)
    nearly_gram = rounded_gram(nearly)
    second, _ = cholesky_inverse_core(nearly_gram, _unit_scale(nearly_gram), _SECOND_PASS)
    triangle = second.mT @ nearly_gram @ first.triangle()
    return nearly, second.to(panel.dtype), triangle.to(panel.dtype)


def spanning(panel: Tensor) -> Tensor:
    """Return a matrix of the size of P whose columns span what those of P do, and are orthonormal to about √ε.

    One pass of `orthonormalize`, enough between two products. Columns that depend on earlier ones become zero.
    """
    panel_gram = gram(panel)
    first = _first_pass(panel, panel_gram, panel_gram.diagonal(dim1=-2, dim2=-1).sqrt(), panel.shape[-1], WHOLE)
    spanned: Tensor = first.panel @ first.transform.to(panel.dtype)
    return spanned


class _FirstPass(NamedTuple):
    """P = P′ B and P′ ≈ (P′ T) R, where the columns of P′ T are nearly orthonormal, or zero."""

    panel: Tall  # P′       [..., n, k]
    gram: Tensor  # P′ᵀP′       [..., k, k], float64
    transform: Tensor  # T      [..., k, k], float64
    to_panel: Tensor | None  # B, upper triangular; None stands for I

    def triangle(self) -> Tensor:
        """R B, so that P ≈ (P′ T) R B."""
        triangle = self.transform.mT @ self.gram
        return triangle if self.to_panel is None else triangle @ self.to_panel


def _first_pass(panel: Tall, panel_gram: Tensor, length: Tensor, width: int, rows: Rows) -> _FirstPass:
    """Orthonormalise a panel as far as its Gram matrix allows.

    A float64 Gram matrix resolves float64 columns only down to √ε of their length, so there a shifted Cholesky factor
    first brings the panel's condition down to 1/√ε (shifted Cholesky QR).
    """
    dtype = tall.dtype_of(panel)
    eps = torch.finfo(dtype).eps
    if dtype != panel_gram.dtype:
        # Rounding of the projection leaves about √(r + k)·ε of a column that lies inside the span.
        transform, _ = cholesky_inverse_core(panel_gram, length, 64 * width * eps**2)
        return _FirstPass(panel, panel_gram, transform, None)
    k = max(tall.columns(panel), 1)
    unit = torch.where(length > 0, length, 1)
    equilibrated = panel_gram / (unit[..., :, None] * unit[..., None, :])
    identity = torch.eye(panel_gram.shape[-1], dtype=dtype, device=panel_gram.device)
    to_panel = torch.linalg.cholesky_ex(equilibrated + 64 * k * eps * identity).L.mT * unit[..., None, :]
    panel = _solve_from_right(panel, to_panel)
    panel_gram = rows.total(gram(panel))
    transform, _ = cholesky_inverse_core(panel_gram, torch.ones_like(length), 16 * k * eps)
    return _FirstPass(panel, panel_gram, transform, to_panel)


def _solve_from_right(panel: Tall, triangle: Tensor) -> Tall:
    """Return P B⁻¹ for upper triangular B."""
    if isinstance(panel, Tensor):
        return torch.linalg.solve_triangular(triangle, panel, upper=True, left=False)
    return [_solve_from_right(part, own) for part, own in zip(panel, triangle, strict=True)]


def _overlap(basis: Tall, length: Tensor, panel: Tall, transform: Tensor, rows: Rows) -> Tensor:
    """UᵀP (..., r, k), or 0 where the rounding of the projection reaches Q at most four times magnified."""
    if bool(((length.square()[..., :, None] * transform.square()).sum(-2) <= 16).all()):
        return transform.new_zeros(*transform.shape[:-2], tall.columns(basis), transform.shape[-1])
    return rows.total(project(basis, panel)).double()


def _each(function: Callable[..., Tensor], matrices: Tall, *others: Tall | Tensor) -> Tall:
    """Return ``function`` of a matrix, or of each in a list; what belongs to a list is stacked."""
    if isinstance(matrices, Tensor):
        return function(matrices, *others)
    return [function(*members) for members in zip(matrices, *others, strict=True)]


def _stacked(small: Tall) -> Tensor:
    """Return a small matrix as it is, those of a list stacked."""
    return small if isinstance(small, Tensor) else torch.stack(small)


def _unit_scale(matrix: Tensor) -> Tensor:
    """Scale 1 for columns that hold something, 0 for the ones already cleared."""
    return (matrix.diagonal(dim1=-2, dim2=-1) > 0).to(matrix.dtype)
