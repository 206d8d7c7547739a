"""New columns split into their part in the span of a basis and an orthonormal rest: the two passes of every update.

Columns that depend on earlier ones, or lie in the span of the basis, leave zero columns in the rest. Derivation and
error bounds: ``docs/orthonormalisation.md``.

Tall matrices are one, a batch, or a list with different n (`brandla_kernels.tall`); what belongs to a list is stacked.
They may be some of the rows of larger ones: ``rows.total`` makes an inner product over all rows of one over these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brandla._drift import measure_drift, without_drift
from brandla._sharded import WHOLE, Rows
from brandla.orthonormal import SECOND_PASS, first_pass, unit_scale
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

# Columns up to which a float64 Gram matrix, which two passes need, is cheap enough to begin with.
_NARROW = 32


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


class _Parts(NamedTuple):
    """A `Split` but for the drift, which has nothing to do with the columns."""

    coefficients: Tensor
    triangle: Tensor
    panel: Tall
    overlap: Tensor
    transform: Tensor


class _Attempt(NamedTuple):
    """T and R of one pass, for which matrices of a batch or a list it is as good as two, and for which C₂ is 0 then."""

    transform: Tensor
    triangle: Tensor
    good: Tensor
    clean: Tensor


def split(basis: Tall, columns: Tall, rows: Rows = WHOLE) -> Split:
    """Split columns A (..., n, k) into their part in the span of an orthonormal U (..., n, r) and the rest."""
    coefficients = rows.total(project(basis, columns))
    if reads_are_free(coefficients):
        panel = tall.each(subtract_product, columns, basis, coefficients)
        parts = _as_few_passes(basis, coefficients.double(), panel, rows)
    else:
        panel, panel_gram = residual(basis, columns, coefficients)
        parts = _two_passes(basis, coefficients.double(), panel, rows.total(panel_gram), rows)
    return Split(*parts, measure_drift(basis, rows))


def _as_few_passes(basis: Tall, coefficients: Tensor, panel: Tall, rows: Rows) -> _Parts:
    """Split in one pass where that is as good as two, each matrix of a list by itself, those of a batch alike."""
    exact = tall.columns(panel) <= _NARROW
    panel_gram = rows.total(gram(panel) if exact else tall.stacked(tall.each(rounded_gram, panel)))
    attempt = _attempt(coefficients, panel_gram, tall.dtype_of(panel))
    good = attempt.good.flatten().tolist()
    if all(good):
        return _one_pass(basis, coefficients, panel, attempt, rows)
    if isinstance(panel, Tensor) or rows is not WHOLE or not any(good):
        panel_gram = panel_gram if exact else rows.total(gram(panel))
        return _two_passes(basis, coefficients, panel, panel_gram, rows)
    easy, hard = ([index for index, each in enumerate(good) if each is wanted] for wanted in (True, False))
    attempt = _Attempt(*(part[easy] for part in attempt))
    one = _one_pass(_members(basis, easy), coefficients[easy], _members(panel, easy), attempt, rows)
    panel = _members(panel, hard)
    panel_gram = panel_gram[hard] if exact else gram(panel)
    two = _two_passes(_members(basis, hard), coefficients[hard], panel, panel_gram, rows)
    order = sorted(range(len(good)), key=[*easy, *hard].__getitem__)
    return _Parts(*(_members(_joined(*pair), order) for pair in zip(one, two, strict=True)))


def _members(part: Tall, indices: list[int]) -> Tall:
    """Return what belongs to some of the matrices of a list: of the list itself, or of what is stacked."""
    return part[indices] if isinstance(part, Tensor) else [part[index] for index in indices]


def _joined(first: Tall, second: Tall) -> Tall:
    return torch.cat([first, second]) if isinstance(first, Tensor) else [*first, *second]


def _lengths(coefficients: Tensor, panel_gram: Tensor) -> Tensor:
    """‖a_j‖ (..., k) by Pythagoras, with no pass of its own: a residual is judged against the column it came from."""
    return (coefficients.square().sum(-2) + panel_gram.diagonal(dim1=-2, dim2=-1)).sqrt()


def _attempt(coefficients: Tensor, panel_gram: Tensor, dtype: torch.dtype) -> _Attempt:
    """Orthonormalise in one pass: as good as two where no column lost 99 % of its length, and none leans on the others.

    Rounding then enters Q at most four times magnified, by T, and that of a Gram matrix of rounded products sixteen
    times; and a hundred times through what U still shares with P, which is measured and taken out unless it reaches Q
    at most four times magnified.
    """
    length = _lengths(coefficients, panel_gram)
    squares = panel_gram.diagonal(dim1=-2, dim2=-1)
    unit = squares.rsqrt()
    factor, info = torch.linalg.cholesky_ex(panel_gram * unit[..., :, None] * unit[..., None, :])
    identity = torch.eye(squares.shape[-1], dtype=squares.dtype)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    finfo = torch.finfo(dtype)
    # A rounded square must be a normal number.
    stands_out = (squares > finfo.tiny / finfo.eps) & (squares > 1e-4 * length.square())
    stands_out &= inverse.square().sum(-1) <= 16
    transform, triangle = inverse.mT * unit[..., :, None], factor.mT / unit[..., None, :]
    reaching = (length[..., :, None] * transform).square().sum(-2)
    return _Attempt(transform, triangle, stands_out.all(-1) & (info == 0), (reaching <= 16).all(-1))


def _one_pass(basis: Tall, coefficients: Tensor, panel: Tall, attempt: _Attempt, rows: Rows) -> _Parts:
    """Split as attempted."""
    overlap = torch.zeros_like(coefficients)
    if not bool(attempt.clean.all()):
        overlap = rows.total(project(basis, panel)).double()
    return _Parts(coefficients + overlap, attempt.triangle, panel, overlap, attempt.transform)


def _two_passes(basis: Tall, coefficients: Tensor, panel: Tall, panel_gram: Tensor, rows: Rows) -> _Parts:
    """Split whatever the columns are: the second pass orthogonalises what the first left."""
    length = _lengths(coefficients, panel_gram)
    first = first_pass(panel, panel_gram, length, tall.columns(basis) + tall.columns(panel), rows)
    refined, overlap, refined_gram = refine(basis, first.panel, first.transform.to(tall.dtype_of(panel)))
    overlap, refined_gram = rows.totals(overlap.double(), refined_gram)
    first_triangle = first.triangle()
    cleaned = refined_gram - overlap.mT @ overlap
    second, _ = cholesky_inverse_core(cleaned, unit_scale(refined_gram), SECOND_PASS)
    triangle = second.mT @ cleaned @ first_triangle
    return _Parts(coefficients + overlap @ first_triangle, triangle, refined, overlap, second)
