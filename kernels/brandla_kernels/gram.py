"""``gram``: G = PᵀP, summed in float64.

P is (..., n, k), G is (..., k, k). P is read once.
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op

# From this width on, the products left out outweigh the calls added.
_WIDE = 128
_BLOCKS = 4


def cost(n: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * k * k, bytes=itemsize * n * k + 8 * k * k)


def gram_torch(panel: Tensor) -> Tensor:
    """Return ``panel.mT @ panel`` in float64, computing only the blocks on and above the diagonal of a wide one."""
    wide = panel.double()
    k = panel.shape[-1]
    if k < _WIDE:
        return wide.mT @ wide
    block = -(-k // _BLOCKS)
    gram = wide.new_empty(*panel.shape[:-2], k, k)
    for start in range(0, k, block):
        rows, rest = slice(start, start + block), slice(start, k)
        product = wide[..., rows].mT @ wide[..., rest]
        gram[..., rows, rest] = product
        gram[..., rest, rows] = product.mT
    return gram


gram = op("gram(Tensor panel) -> Tensor", cost)(gram_torch)
