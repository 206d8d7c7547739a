"""``refine``: Q = P T, and in the same pass UᵀQ and QᵀQ: the second projection of a two-pass Gram–Schmidt.

U is (..., n, r), P and Q are (..., n, k), T is (..., k, k). T makes the columns of P nearly orthonormal; what Q still
shares with U, and how far it is from orthonormal, come out as the small matrices UᵀQ (..., r, k) and QᵀQ (..., k, k,
summed in float64), so that the correction never has to be applied to the tall matrix by itself.
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels.gram import gram_torch


def cost(n: int, r: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    flops = 2 * n * k * k + 2 * n * r * k + 2 * n * k * k
    return Cost(flops=flops, bytes=itemsize * (n * r + 2 * n * k + r * k) + 8 * k * k)


@op("refine(Tensor basis, Tensor panel, Tensor transform) -> (Tensor, Tensor, Tensor)", cost)
def refine(basis: Tensor, panel: Tensor, transform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``Q = panel @ transform``, ``basis.mT @ Q`` and the float64 Gram matrix of ``Q``."""
    refined = panel @ transform
    return refined, basis.mT @ refined, gram_torch(refined)
