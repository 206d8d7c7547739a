"""The small dense problems: eigen- and singular value decompositions that do not fail."""

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

# A core of order m takes longer in float64 than in float32 by as much as a polish at n r² = m³ times this.
_FLOAT64_COSTS = 16
# Order up to which the difference is below the cost of the polish's calls.
_SMALL = 64


def safe_eigh(core: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return all eigenpairs of a small positive semi-definite matrix, by `leading`, in its own precision by default."""
    dtype = dtype or core.dtype
    if core.numel() and ops.reads_are_free(core) and not core.requires_grad:
        limits = torch.finfo(dtype)
        least, most = (extreme.item() for extreme in core.diagonal(dim1=-2, dim2=-1).aminmax())
        in_range = least * limits.eps >= limits.tiny and most <= limits.max * limits.eps
        # It is finite and well in range, and no coordinate of it is empty.
        if in_range and math.isfinite(core.sum().item()):
            values, vectors = _eigh_with_retry(core.to(dtype))
            return values.flip(-1).clamp_min(0), vectors.flip(-1)
    return leading(core, core.shape[-1], dtype)


class Spectrum(NamedTuple):
    """S = V diag(d) Vᵀ for functions of S whose derivative is right where eigenvalues coincide."""

    values: Tensor  # d, descending: (..., r)
    vectors: Tensor | None = None  # V; None of a diagonal S
    moved: Tensor | None = None  # VᵀSV − diag(d): 0, with the derivative of S

    def of(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return f(S) for a function of the eigenvalues: V f(d) Vᵀ, or f(d) of a diagonal S."""
        levels, vectors, moved = function(self.values), self.vectors, self.moved
        if vectors is None:
            return levels
        if moved is None:
            return (vectors * levels[..., None, :]) @ vectors.mT
        # To first order V moves f(S) by these slopes times the entries of VᵀSV (Daleckii and Krein).
        slopes = _slopes(function, self.values.detach())
        off_diagonal = moved - torch.diag_embed(moved.diagonal(dim1=-2, dim2=-1))
        return vectors @ (torch.diag_embed(levels) + slopes * off_diagonal) @ vectors.mT


def spectrum(matrix: Tensor) -> Spectrum:
    """Return the spectrum of a small symmetric positive semi-definite matrix. It can be differentiated once."""
    values, vectors = safe_eigh(matrix.detach())
    if not matrix.requires_grad:
        return Spectrum(values, vectors)
    # torch leaves Function.apply without annotations.
    moved = _Once.apply(vectors.mT @ (matrix - matrix.detach()) @ vectors)  # type: ignore[no-untyped-call]
    return Spectrum(values + moved.diagonal(dim1=-2, dim2=-1), vectors, moved)


def _slopes(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Return (f(dᵢ) − f(dⱼ))/(dᵢ − dⱼ), and f′ where the two agree to √ε."""
    with torch.enable_grad():
        argument = values.clone().requires_grad_()
        levels = function(argument)
        (slope,) = torch.autograd.grad(levels.sum(), argument)
    row, column = (..., slice(None), None), (..., None, slice(None))
    levels, gap = levels.detach(), values[row] - values[column]
    near = gap.abs() <= torch.finfo(values.dtype).eps ** 0.5 * (values[row] + values[column])
    return torch.where(
        near, (slope[row] + slope[column]) / 2, (levels[row] - levels[column]) / torch.where(near, 1, gap)
    )


class _Once(torch.autograd.Function):
    """y = x, which a second derivative does not pass without an error."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def unresolved(dtype: torch.dtype, order: int) -> float:
    """Return what eigenvalues of a core may be its rounding, relative to the largest: 8 ε, or √m ε of a large order."""
    # Of a core of order 160 whose columns repeat, float32 `eigh` gave values of 8.4 ε for zeros.
    return float(torch.finfo(dtype).eps * max(8, order**0.5))


def leading(
    core: Tensor, rank: int, dtype: torch.dtype, tol: float = 0.0, *, unit: bool = False, n: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the ``rank`` leading eigenpairs of a small positive semi-definite matrix, descending, in ``dtype``.

    Values up to ``tol`` times the largest become 0, with zero vectors, and count as left out. With ``unit`` the vectors
    are V Σ⁻¹ for values Σ²: of a panel B with BᵀB = V Σ² Vᵀ, B V Σ⁻¹ is orthonormal. A coordinate whose diagonal entry
    is 0 has a zero eigenvector. A matrix that is not finite, or beyond ``dtype``, gives NaN throughout.
    """
    own = core.double()
    one = 1.0 if ops.reads_are_free(own) else own.new_ones(own.shape[:-2])
    nothing = own.diagonal(dim1=-2, dim2=-1)[..., :0].to(dtype)
    scaled = ops.eigh_core(own[..., :0, :], own, nothing, one, one, rounded=not ops.reads_are_free(own))
    return leading_of(*scaled, rank, dtype, tol, unit, n)[:2]


def leading_of(
    core: Tensor, rows: Tensor, scale: Tensor, rank: int, dtype: torch.dtype, tol: float, unit: bool, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, the rotation of tall matrices (..., n, m), and the value left out, of a core by `eigh_core`."""
    m = core.shape[-1]
    # On a CPU float64 may take less than the polish that its nearly unit columns spare.
    spares = m <= _SMALL or n * rank**2 > _FLOAT64_COSTS * m**3
    wide = torch.float64 if unit and spares and ops.reads_are_free(core) else dtype
    found = ops.eigh_rotation(*_eigh_with_retry(core.to(wide)), rows, scale, rank, float(tol), unit)
    values, vectors, left_out = found if wide == dtype else (part.to(dtype) for part in found)
    if ops.reads_are_free(values) and values.numel() and values[..., 0].amin().item() < torch.finfo(dtype).tiny:
        values = ops.without_denormals(values)
    return values, vectors, left_out


def signs_of(agreement: Tensor) -> Tensor:
    """Return ±1 (..., s), by which new vectors are multiplied to agree with old ones: the signs of their products."""
    return torch.ones_like(agreement).copysign(agreement.detach())


def safe_svd(core: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V, in float64, of a small matrix whose empty rows and columns stay empty.

    Values below 4·ε of ``dtype`` relative to the largest are rounding noise of the data and become 0, with zero
    vectors. A core with a non-finite entry gives NaN throughout.
    """
    core = core.double()
    if core.numel() == 0:
        left, values, right = torch.linalg.svd(core, full_matrices=False)
        return left, values, right.mT
    # NaN and infinity survive a sum in float64.
    finite = torch.isfinite(core.sum((-2, -1)))
    clean = torch.where(finite[..., None, None], core, 0)
    scale = clean.abs().amax((-2, -1))
    scale = torch.where(scale > 0, scale, 1)[..., None]
    left, values, right = torch.linalg.svd(clean / scale[..., None], full_matrices=False)
    left = left * (clean.abs().amax(-1) > 0)[..., :, None]
    right = right.mT * (clean.abs().amax(-2) > 0)[..., :, None]
    # A vector of an empty coordinate has no value, even where rounding of the others is above the threshold.
    alive = values > 4 * torch.finfo(dtype).eps * values[..., :1]
    alive = alive & (left.square().sum(-2) > 0.5) & (right.square().sum(-2) > 0.5)
    poison = torch.where(finite, 0, math.nan)[..., None]

    def orthonormal(vectors: Tensor) -> Tensor:
        # They were unit vectors before the rows of empty coordinates were cleared.
        kept = vectors * alive[..., None, :]
        transform, _ = ops.cholesky_inverse_core(kept.mT @ kept, alive.to(kept.dtype), 0.25)
        turned: Tensor = kept @ transform
        return turned + poison[..., None]

    return orthonormal(left), values * scale * alive + poison, orthonormal(right)


def largest_eigenvalue(core: Tensor) -> Tensor:
    """Estimate the largest eigenvalue of a positive semi-definite core (..., r, r) from below, with no sync."""
    if core.shape[-1] == 0:
        return core.sum((-2, -1))
    tiny = torch.finfo(core.dtype).tiny
    most, chosen = core.diagonal(dim1=-2, dim2=-1).max(-1, keepdim=True)
    scale = most[..., None].clamp_min(tiny)
    # Four power iterations, exact for a diagonal core. Lengths are relative, so that their squares stay in range.
    vector = ops.tall.columns_at(core, chosen) / scale
    for _ in range(4):
        vector = core @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(tiny)) / scale
    length: Tensor = torch.linalg.vector_norm(vector, dim=-2)[..., 0]
    return torch.maximum(length * scale[..., 0, 0], most[..., 0])


def _eigh_with_retry(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors, also where LAPACK fails in the dtype given."""
    if matrix.requires_grad:
        # torch leaves Function.apply without annotations.
        found: tuple[Tensor, Tensor] = _Eigh.apply(matrix)  # type: ignore[no-untyped-call]
        return found
    try:
        values, vectors = torch.linalg.eigh(matrix)
        # NaN and infinity survive a sum. Where LAPACK leaves them, they are among the values.
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
            " use root_update with compress='cholesky', which needs none"
        )
        raise RuntimeError(message) from error
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


class _Eigh(torch.autograd.Function):
    """``torch.linalg.eigh`` whose derivative stays finite where eigenvectors that nothing depends on have one value."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = _eigh_with_retry(matrix.detach())
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, of_values: Tensor, of_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        turned = vectors.mT @ of_vectors
        inner = torch.where(turned == 0, 0, turned / (values[..., None, :] - values[..., :, None]))
        inner.diagonal(dim1=-2, dim2=-1).copy_(of_values)
        of_matrix: Tensor = vectors @ inner @ vectors.mT
        return of_matrix
