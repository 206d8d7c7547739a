"""``eigh_core``: the core of a symmetric update, ready for an eigendecomposition.

From S = FᵀF (..., r, r), C = FᵀA (..., r, k) and G = AᵀA (..., k, k), the Gram matrix of B = [√ρ F, √w A] is

    K = [ ρS, √(ρw) C; √(ρw) Cᵀ, wG ].

The op returns K/σ, in float64 or rounded to the dtype of S; the diagonal of D in K = D [S, C; Cᵀ, G] D; and σ, a power
of two near the largest entry of K, which counts as a constant in derivatives. For eigenvectors V, the rows of D V are
V₁ and V₂ of B V = F V₁ + A V₂. S may be the diagonal d of a root F = U √d. Then C is UᵀA, and V₁ multiplies U.

A coordinate with a diagonal entry of 0 is empty. `EMPTY` takes the place of this entry, as far below 0 as the largest
values are above: then no rounding mixes the coordinate into the eigenvectors of the others. It is no farther away, as
LAPACK's errors are relative to the largest value of either sign. If K is not finite, or beyond the range of the dtype
of S, the core is that of K = 0, and σ and the rows are NaN. If K vanishes in float64, it counts as 0, and σ is 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op, reads_are_free, recomputed_gradient

EMPTY = -1.0
# A core whose largest entry is smaller is zero.
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
    """Return K/σ (..., m, m), and in float64 the factors of its rows (..., m) and σ (...,).

    Parameters
    ----------
    cross, own
        C (..., r, k), or UᵀA if ``gram`` is d, and G (..., k, k), float64.
    gram
        S (..., r, r), or d (..., r), float32 or float64.
    decay, weight
        ρ and w of each problem, >= 0, float64. The torch form also takes numbers.
    rounded
        Whether K/σ is rounded to the dtype of S, for an eigendecomposition in this dtype.
    """
    core, rows = assembled(gram, cross, own, decay, weight)
    dtype = gram.dtype if rounded else core.dtype
    diagonal, limits = core.diagonal(dim1=-2, dim2=-1), torch.finfo(gram.dtype)
    largest = diagonal.detach().amax(-1) if core.shape[-1] else diagonal.sum(-1)
    # The least power of two above the largest entry.
    near = largest / torch.frexp(largest).mantissa
    if core.numel() and reads_are_free(core):
        least, most = (extreme.item() for extreme in diagonal.aminmax())
        # K is finite and well in range, and no coordinate is empty.
        if least >= TINY and most <= limits.max / core.shape[-1] and math.isfinite(core.sum().item()):
            divisor = near[..., None, None]
            return (core / divisor if core.requires_grad else core.div_(divisor)).to(dtype), rows, near
    # A comparison with NaN is false.
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
    new_scales = _expanded_sqrt(weight, own.shape[:-1], own)
    old_scales = _expanded_sqrt(decay, cross.shape[:-1], own)
    old = gram
    if gram.ndim < own.ndim:
        # The root √d √ρ has a derivative with respect to ρ where d is 0; √(ρd) has none.
        old, old_scales = torch.diag_embed(torch.ones_like(gram)), gram.double().sqrt() * old_scales
    row_scales = torch.cat([old_scales, new_scales], -1)
    # torch.cat takes the wider dtype.
    above, below = torch.cat([old, cross], -1), torch.cat([cross.mT, own], -1)
    core = torch.cat([above, below], -2)
    if core.requires_grad or row_scales.requires_grad:
        return core * row_scales[..., :, None] * row_scales[..., None, :], row_scales
    # In place, since new memory would take longer than the products.
    return core.mul_(row_scales[..., :, None]).mul_(row_scales[..., None, :]), row_scales


def _expanded_sqrt(number: float | Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """Return the square root of each problem's number in every place of ``shape``."""
    if isinstance(number, Tensor):
        return number.sqrt()[..., None].expand(shape)
    return like.new_full(shape, math.sqrt(number))


eigh_core.gradient(recomputed_gradient(eigh_core, 5))
