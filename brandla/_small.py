"""Eigen- and singular value decompositions of small dense matrices, which do not fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch.linalg does not list its error in __all__.
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

import brandla_kernels as ops

# The extra cost of float64 over float32, for a core of order m, equals that of a polish with n r² = m³ times this.
_FLOAT64_COST_RATIO = 16
# Up to this order, the extra cost of float64 is below that of the calls of the polish.
_SMALL_ORDER = 64


def safe_eigh(core: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return all eigenpairs, descending, of a small positive semi-definite matrix, by default in its own precision."""
    dtype = dtype or core.dtype
    if core.numel() and ops.reads_are_free(core) and not core.requires_grad:
        limits = torch.finfo(dtype)
        least, most = (extreme.item() for extreme in core.diagonal(dim1=-2, dim2=-1).aminmax())
        in_range = least * limits.eps >= limits.tiny and most <= limits.max * limits.eps
        # A finite matrix well in range, with no empty coordinate, needs none of the care of `leading_eigh`.
        if in_range and math.isfinite(core.sum().item()):
            values, vectors = _eigh_with_retry(core.to(dtype))
            return values.flip(-1).clamp_min(0), vectors.flip(-1)
    return leading_eigh(core, core.shape[-1], dtype)


class Spectrum(NamedTuple):
    """S = V diag(d) Vᵀ, for functions of S whose derivative is right even if eigenvalues coincide."""

    values: Tensor  # d, descending: (..., r)
    vectors: Tensor | None = None  # V; None for a diagonal S
    perturbation: Tensor | None = None  # VᵀSV − diag(d): zeros that carry the derivative of S

    def apply(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return f(S) for a function f of the eigenvalues: V f(d) Vᵀ, or f(d) for a diagonal S."""
        images, vectors, perturbation = function(self.values), self.vectors, self.perturbation
        if vectors is None:
            return images
        if perturbation is None:
            return (vectors * images[..., None, :]) @ vectors.mT
        # To first order f(S) changes in the basis V by these quotients times the entries of VᵀSV (Daleckii and Krein).
        quotients = _divided_differences(function, self.values.detach())
        off_diagonal = perturbation - torch.diag_embed(perturbation.diagonal(dim1=-2, dim2=-1))
        return vectors @ (torch.diag_embed(images) + quotients * off_diagonal) @ vectors.mT


def spectrum(matrix: Tensor) -> Spectrum:
    """Return the spectrum of a small symmetric positive semi-definite matrix, differentiable once."""
    values, vectors = safe_eigh(matrix.detach())
    if not matrix.requires_grad:
        return Spectrum(values, vectors)
    # torch leaves Function.apply without annotations.
    perturbation = _DifferentiableOnce.apply(vectors.mT @ (matrix - matrix.detach()) @ vectors)  # type: ignore[no-untyped-call]
    return Spectrum(values + perturbation.diagonal(dim1=-2, dim2=-1), vectors, perturbation)


def _divided_differences(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Return (f(dᵢ) − f(dⱼ))/(dᵢ − dⱼ), or f′ if dᵢ and dⱼ agree to √ε."""
    with torch.enable_grad():
        argument = values.clone().requires_grad_()
        images = function(argument)
        (derivative,) = torch.autograd.grad(images.sum(), argument)
    row, column = (..., slice(None), None), (..., None, slice(None))
    images, gap = images.detach(), values[row] - values[column]
    near = gap.abs() <= torch.finfo(values.dtype).eps ** 0.5 * (values[row] + values[column])
    quotients = (images[row] - images[column]) / torch.where(near, 1, gap)
    return torch.where(near, (derivative[row] + derivative[column]) / 2, quotients)


class _DifferentiableOnce(torch.autograd.Function):
    """y = x, whose second derivative raises an error."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def noise_level(dtype: torch.dtype, order: int) -> float:
    """Return the relative size up to which eigenvalues of a core may be rounding: 8 ε, or √m ε for a large order m."""
    # For a core of order 160 with repeated columns, float32 `eigh` returned 8.4 ε in place of 0.
    return float(torch.finfo(dtype).eps * max(8, order**0.5))


def leading_eigh(
    core: Tensor, rank: int, dtype: torch.dtype, tol: float = 0.0, *, unit: bool = False, n: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the ``rank`` leading eigenpairs of a small positive semi-definite matrix, descending, in ``dtype``.

    Values up to ``tol`` times the largest become 0, with zero vectors, and count as left out. With ``unit`` the vectors
    are V Σ⁻¹ for values Σ²: if a panel B has BᵀB = V Σ² Vᵀ, then B V Σ⁻¹ is orthonormal. A coordinate whose diagonal
    entry is 0 has a zero eigenvector. A matrix that is not finite, or out of the range of ``dtype``, gives NaN
    throughout. ``n`` is the number of rows of B, by which `truncate_core` chooses a precision.
    """
    core = core.double()
    may_read = ops.reads_are_free(core)
    one = 1.0 if may_read else core.new_ones(core.shape[:-2])
    empty = core.diagonal(dim1=-2, dim2=-1)[..., :0].to(dtype)
    scaled = ops.eigh_core(core[..., :0, :], core, empty, one, one, rounded=not may_read)
    return truncate_core(*scaled, rank, dtype, tol, unit, n)[:2]


def truncate_core(
    core: Tensor, row_scales: Tensor, scale: Tensor, rank: int, dtype: torch.dtype, tol: float, unit: bool, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values, the rotation (..., m, rank) and the largest value left out of a core by `eigh_core`."""
    m = core.shape[-1]
    # On a CPU float64 may cost less than the polish, which its nearly unit columns make unnecessary.
    is_cheap = m <= _SMALL_ORDER or n * rank**2 > _FLOAT64_COST_RATIO * m**3
    wide = torch.float64 if unit and is_cheap and ops.reads_are_free(core) else dtype
    parts = ops.eigh_rotation(*_eigh_with_retry(core.to(wide)), row_scales, scale, rank, float(tol), unit)
    values, vectors, left_out = parts if wide == dtype else (part.to(dtype) for part in parts)
    if ops.reads_are_free(values) and values.numel() and values[..., 0].amin().item() < torch.finfo(dtype).tiny:
        values = ops.without_denormals(values)
    return values, vectors, left_out


def signs_of(agreement: Tensor) -> Tensor:
    """Return the factors ±1 (..., s) that turn new vectors towards old ones: the signs of their inner products."""
    return torch.ones_like(agreement).copysign(agreement.detach())


def safe_svd(core: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of a small matrix in float64. Empty rows and columns stay empty.

    Values below 4·ε of ``dtype`` relative to the largest are rounding of the data and become 0, with zero vectors. A
    core with a non-finite entry gives NaN throughout.
    """
    core = core.double()
    if core.numel() == 0:
        left, values, right = torch.linalg.svd(core, full_matrices=False)
        return left, values, right.mT
    # A float64 sum keeps NaN and infinity.
    finite = torch.isfinite(core.sum((-2, -1)))
    clean = torch.where(finite[..., None, None], core, 0)
    scale = clean.abs().amax((-2, -1))
    scale = torch.where(scale > 0, scale, 1)[..., None]
    left, values, right = torch.linalg.svd(clean / scale[..., None], full_matrices=False)
    left = left * (clean.abs().amax(-1) > 0)[..., :, None]
    right = right.mT * (clean.abs().amax(-2) > 0)[..., :, None]
    # A vector along an empty coordinate is dropped, even if its value, which is rounding, is above the threshold.
    alive = values > 4 * torch.finfo(dtype).eps * values[..., :1]
    alive = alive & (left.square().sum(-2) > 0.5) & (right.square().sum(-2) > 0.5)
    poison = torch.where(finite, 0, math.nan)[..., None]

    def orthonormal(vectors: Tensor) -> Tensor:
        # Clearing the rows of empty coordinates shortened vectors that were unit.
        kept = vectors * alive[..., None, :]
        transform, _ = ops.cholesky_inverse_core(kept.mT @ kept, alive.to(kept.dtype), 0.25)
        repaired: Tensor = kept @ transform
        return repaired + poison[..., None]

    return orthonormal(left), values * scale * alive + poison, orthonormal(right)


def largest_eigenvalue(core: Tensor) -> Tensor:
    """Estimate the largest eigenvalue of a positive semi-definite core (..., r, r) from below, with no sync."""
    if core.shape[-1] == 0:
        return core.sum((-2, -1))
    tiny = torch.finfo(core.dtype).tiny
    most, chosen = core.diagonal(dim1=-2, dim2=-1).max(-1, keepdim=True)
    scale = most[..., None].clamp_min(tiny)
    # Four power iterations, exact for a diagonal core. Division by the scale keeps squared lengths in range.
    vector = ops.tall.columns_at(core, chosen) / scale
    for _ in range(4):
        vector = core @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(tiny)) / scale
    length: Tensor = torch.linalg.vector_norm(vector, dim=-2)[..., 0]
    return torch.maximum(length * scale[..., 0, 0], most[..., 0])


def _eigh_with_retry(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors; where LAPACK fails in the dtype given, from float64."""
    if matrix.requires_grad:
        # torch leaves Function.apply without annotations.
        pairs: tuple[Tensor, Tensor] = _Eigh.apply(matrix)  # type: ignore[no-untyped-call]
        return pairs
    try:
        values, vectors = torch.linalg.eigh(matrix)
        # A sum keeps NaN and infinity. If LAPACK returns any, some are among the values. The compiler breaks its graph
        # at this read; other fake tensors have no values to read.
        if not (torch.compiler.is_compiling() or ops.has_values(values)) or math.isfinite(values.sum().item()):
            return values, vectors
    except LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except LinAlgError as error:
        order = matrix.shape[-1]
        message = (
            f"brandla: eigendecomposition of a finite core of order {order} failed in {matrix.dtype} and in float64;"
            " use root_update with compress='cholesky', which needs no eigendecomposition"
        )
        raise RuntimeError(message) from error
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


class _Eigh(torch.autograd.Function):
    """``torch.linalg.eigh`` with a finite derivative if eigenvectors that nothing depends on share an eigenvalue."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = _eigh_with_retry(matrix.detach())
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, of_values: Tensor, of_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        in_basis = vectors.mT @ of_vectors
        inner = torch.where(in_basis == 0, 0, in_basis / (values[..., None, :] - values[..., :, None]))
        inner.diagonal(dim1=-2, dim2=-1).copy_(of_values)
        of_matrix: Tensor = vectors @ inner @ vectors.mT
        return of_matrix
