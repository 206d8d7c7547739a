"""``root_core``: the small problem in the update of a square root, between the two passes over the tall matrices.

From S = FᵀF (..., r, r), C = FᵀA (..., r, k) and G = AᵀA (..., k, k), the Gram matrix of B = [√ρ F, √w A] is

    K = [ ρS, √(ρw) C; √(ρw) Cᵀ, wG ].

The op finds W (..., r + k, s), with orthonormal or zero columns near the leading eigenvectors of K. It returns
S⁺ = WᵀK W; √ρ W₁ and √w W₂ with the rows W₁ and W₂ of W, so that F⁺ = F (√ρ W₁) + A (√w W₂); the Frobenius norm of the
part left out, (I − W Wᵀ) K (I − W Wᵀ); and the trace that A adds, w tr G.

W comes from two steps of the LR algorithm: no eigendecomposition, no branch on data, nothing waits for the device.
K + σI = RᵀR, and L = R Rᵀ is the same matrix in orthonormal coordinates and nearer to diagonal. The second step
factors L with its diagonal in descending order: ΠᵀLΠ = R₂ᵀR₂. Z are the unit vectors of the longest rows of R₂, and
W = orth(RᵀLΠR₂ᵀZ). If K is not finite, all computed results are NaN. Derivation: ``docs/updates.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brandla_kernels import tall
from brandla_kernels._op import Cost, op, recomputed_gradient
from brandla_kernels.cholesky_inverse_core import cholesky_inverse_core
from brandla_kernels.eigh_core import assembled


def cost(r: int, k: int, s: int, itemsize: int = 4) -> Cost:
    """Work of one call: two factorisations of order m = r + k, and products with m × s matrices."""
    m = r + k
    flops = 2 * m**3 // 3 + m**3 + 6 * m * m * s + 8 * m * s * s
    return Cost(flops, itemsize * (r * r + s * s + m * s) + 8 * (r * k + k * k))


@op(
    "root_core(Small[r,r] gram, Sum[r,k] cross, Sum[k,k] own, Sum[] decay, Sum[] weight, int rank, float tol,"
    " bool measure) -> (Small[s,s], Small[r,s], Small[k,s], Small[], Small[])",
    cost,
    "root_core.root_core",
)
def root_core(
    gram: Tensor, cross: Tensor, own: Tensor, decay: Tensor, weight: Tensor, rank: int, tol: float, measure: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return S⁺, √ρ W₁, √w W₂, the norm of the part left out, and w tr G, in the dtype of S.

    Parameters
    ----------
    gram
        S (..., r, r), float32 or float64.
    cross, own
        C (..., r, k) and G (..., k, k), float64.
    decay, weight
        ρ and w of each problem, >= 0, float64: the product of a weight and a square may be in range even if neither is.
    rank
        s, columns of W, at most r + k.
    tol
        A column becomes zero if its entry on the diagonal of S⁺ is at most ``tol`` times the largest.
    measure
        Whether to compute the norm of the part left out; it is 0 otherwise.
    """
    r, dtype = gram.shape[-1], gram.dtype
    core, rows = assembled(gram, cross, own, decay, weight)
    small, rotation, left_out = compressed(core, rank, dtype, tol, measure)
    rotation = rotation * rows[..., :, None]
    # Results of an op must not share memory.
    of_root, of_columns = (part.to(dtype, copy=True) for part in (rotation[..., :r, :], rotation[..., r:, :]))
    added = core.diagonal(dim1=-2, dim2=-1)[..., r:].sum(-1) + 0 * core.sum((-2, -1))
    return small, of_root, of_columns, left_out.to(dtype), added.to(dtype)


class Compressed(NamedTuple):
    """A core K compressed to the range of W: S = WᵀK W, W, and the norm of (I − W Wᵀ) K (I − W Wᵀ)."""

    gram: Tensor  # (..., rank, rank)
    rotation: Tensor  # (..., m, rank), orthonormal or zero columns
    left_out: Tensor  # (...,): the Frobenius norm, or 0 if it is not asked for


def compressed(core: Tensor, rank: int, dtype: torch.dtype, tol: float, measure: bool) -> Compressed:
    """Compress K (..., m, m), float64, to ``rank`` columns as the module says; σ is 32 ε of ``dtype`` times ‖K‖.

    ``dtype`` is that of the factor from which K was made: K is no more definite than the factor's rounding allows.
    """
    m = core.shape[-1]
    finite = torch.isfinite(core.sum((-2, -1)))[..., None, None]
    identity = torch.eye(m, dtype=core.dtype, device=core.device).expand_as(core)
    if rank == m and not (m and tol):
        rotation = identity.clone()
    else:
        largest = core.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
        normalized = torch.where(finite, core / torch.where(largest > 0, largest, 1), 0)
        shift = 32 * torch.finfo(dtype).eps * torch.linalg.matrix_norm(normalized, keepdim=True)
        factor = _upper_factor(normalized + shift.clamp_min(torch.finfo(dtype).eps) * identity)
        nearer = factor @ factor.mT
        order = nearer.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
        sorted_columns = nearer.take_along_dim(order[..., None, :], -1)
        second = _upper_factor(sorted_columns.take_along_dim(order[..., :, None], -2))
        chosen = second.square().sum(-1).topk(rank, dim=-1).indices
        rotation = _orthonormal(factor.mT @ (sorted_columns @ tall.columns_at(second.mT, chosen)))
    image = core @ rotation
    gram = rotation.mT @ image
    if tol and rank:
        values = gram.diagonal(dim1=-2, dim2=-1)
        alive = (~(values <= tol * values.amax(-1, keepdim=True))).to(core.dtype)
        rotation, image = rotation * alive[..., None, :], image * alive[..., None, :]
        gram = gram * alive[..., None, :] * alive[..., :, None]
    left_out = core.new_zeros(core.shape[:-2])
    if measure:
        rest = core - image @ rotation.mT
        left_out = torch.linalg.matrix_norm(rest - rotation @ (rotation.mT @ rest))
    gram = without_denormals(((gram + gram.mT) / 2).to(dtype), dims=2)
    finite = finite & torch.isfinite(gram.sum((-2, -1), keepdim=True))
    gram, rotation = (torch.where(finite, part, float("nan")) for part in (gram, rotation))
    return Compressed(gram, rotation, left_out)


def _upper_factor(matrix: Tensor) -> Tensor:
    """Return R with M = RᵀR; if rounding left M not definite, the root of its diagonal, which still serves."""
    factor, info = torch.linalg.cholesky_ex(matrix, upper=True)
    plain = torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt())
    return torch.where((info == 0)[..., None, None], factor, plain)


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormalise the columns of a small float64 matrix by shifted Cholesky QR; dependent ones become zero."""
    lengths = torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    matrix = matrix / torch.where(lengths > 0, lengths, 1)
    noise = 64 * max(matrix.shape[-1], 1) * torch.finfo(matrix.dtype).eps
    inner = matrix.mT @ matrix
    identity = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    factor = torch.linalg.cholesky_ex(inner + noise * identity, upper=True).L
    matrix = torch.linalg.solve_triangular(factor, matrix, upper=True, left=False)
    for threshold in (noise, 0.25):
        inner = matrix.mT @ matrix
        scale = (inner.diagonal(dim1=-2, dim2=-1) > 0).to(inner.dtype)
        matrix = matrix @ cholesky_inverse_core(inner, scale, threshold)[0]
    return matrix


def without_denormals(values: Tensor, dims: int = 1) -> Tensor:
    """Zero the values of a factor (the last ``dims`` dimensions) once the largest is no longer a normal number.

    Otherwise the denormals of a stream that dies out would slow down every later product.
    """
    if values.numel() == 0:
        return values
    largest = values.abs().amax(tuple(range(-dims, 0)), keepdim=True)
    return torch.where(largest < torch.finfo(values.dtype).tiny, 0, values)


root_core.gradient(recomputed_gradient(root_core, 5))
