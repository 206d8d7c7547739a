"""``eigh_core``: the core of a symmetric update, ready for an eigendecomposition.

From S = FᵀF (..., r, r), C = FᵀA (..., r, k) and G = AᵀA (..., k, k), the Gram matrix of B = [√ρ F, √w A] is

    K = [ ρS, √(ρw) C; √(ρw) Cᵀ, wG ].

The op returns K/σ, in float64 or rounded to the dtype of S, where σ is a power of two near the largest entry of K; the
factors D of rows in K = D [S, C; Cᵀ, G] D, by which rows of eigenvectors V are multiplied to give V₁ and V₂ of
B V = F V₁ + A V₂; and σ, which counts as a constant in derivatives. S may be the diagonal d of a root F = U √d; then C
is UᵀA, and V₁ is for U.

A coordinate with a diagonal entry of 0 is empty: it gets `EMPTY` there, as far from the values of the others as these
are from 0, so that no rounding mixes it into their eigenvectors, and no farther, since what LAPACK rounds is relative
to the largest value of either sign. A K that is not finite, or beyond the dtype of S, is decomposed as 0: σ and the
rows are NaN then. One that vanishes in float64 is 0, and its σ is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op, reads_are_free, recomputed

EMPTY = -1.0
# A core with no larger entry is zero.
TINY = torch.finfo(torch.float64).tiny


def cost(r: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    m = r + k
    return Cost(2 * m * m, itemsize * r * r + 8 * (r * k + k * k + m * m + m))


@op(
    "eigh_core(Sum[r,k] cross, Sum[k,k] own, Small[r|r,r] gram, Sum[] decay, Sum[] weight, bool rounded=False)"
    " -> (Small[m,m], Sum[m], Sum[])",
    cost,
    "eigh_core.eigh_core",
)
def eigh_core(
    cross: Tensor, own: Tensor, gram: Tensor, decay: float | Tensor, weight: float | Tensor, rounded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return K/σ (..., m, m), the factors of its rows (..., m), and σ (...,), in float64.

    Parameters
    ----------
    cross, own
        C (..., r, k), with a d that of U, and G (..., k, k), float64.
    gram
        S (..., r, r), or d (..., r), float32 or float64.
    decay, weight
        ρ and w of each problem, >= 0, float64. The torch form also takes numbers.
    rounded
        K/σ is of the dtype of S, as an eigendecomposition in that dtype wants it.
    """
    core, rows = assembled(gram, cross, own, decay, weight)
    dtype = gram.dtype if rounded else core.dtype
    diagonal, limits = core.diagonal(dim1=-2, dim2=-1), torch.finfo(gram.dtype)
    largest = diagonal.detach().amax(-1) if core.shape[-1] else diagonal.sum(-1)
    # The least power of two above it.
    near = largest / torch.frexp(largest).mantissa
    if core.numel() and reads_are_free(core):
        least, most = (extreme.item() for extreme in diagonal.aminmax())
        # It is finite and well in range, and has no empty coordinate.
        if least >= TINY and most <= limits.max / core.shape[-1] and math.isfinite(core.sum().item()):
            divisor = near[..., None, None]
            return (core / divisor if core.requires_grad else core.div_(divisor)).to(dtype), rows, near
    # No comparison with NaN holds.
    finite = torch.isfinite(core.sum((-2, -1))) & (diagonal.detach().sum(-1) <= limits.max)
    holds = finite & (largest >= TINY)
    empty = ~(holds[..., None] & (diagonal > 0))
    scale = torch.where(holds, near, 1)
    core = torch.where(holds[..., None, None], core, 0) / scale[..., None, None] + torch.diag_embed(EMPTY * empty)
    scale = torch.where(finite, scale, math.nan)
    return core.to(dtype), rows + 0 * scale[..., None], scale


def assembled(
    gram: Tensor, cross: Tensor, own: Tensor, decay: float | Tensor, weight: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return K and the factors of its rows, in float64."""
    of_new = _filled(weight, own.shape[:-1], own)
    of_old = _filled(decay, cross.shape[:-1], own)
    old = gram
    if gram.ndim < own.ndim:
        # Roots one by one: that of a product has no derivative by ρ where d is 0.
        old, of_old = torch.diag_embed(torch.ones_like(gram)), gram.double().sqrt() * of_old
    rows = torch.cat([of_old, of_new], -1)
    # Of both dtypes the wider one comes out.
    above, below = torch.cat([old, cross], -1), torch.cat([cross.mT, own], -1)
    core = torch.cat([above, below], -2)
    if core.requires_grad or rows.requires_grad:
        return core * rows[..., :, None] * rows[..., None, :], rows
    # New memory for each product takes longer than the product.
    return core.mul_(rows[..., :, None]).mul_(rows[..., None, :]), rows


def _filled(number: float | Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """Return the root of each problem's number in every place."""
    if isinstance(number, Tensor):
        return number.sqrt()[..., None].expand(shape)
    return like.new_full(shape, math.sqrt(number))


eigh_core.gradient(recomputed(eigh_core, 5))
