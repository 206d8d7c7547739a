"""``gram``: G = PᵀP, summed in float64.

P is (..., n, k), G is (..., k, k). P is read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels._signature import Matrices

# Rows converted to float64 at a time: the copy stays small and in cache.
_ROWS = 2048
# Rows whose products are summed in the panel's own dtype: the fewer, the less they round.
_ROUNDED_ROWS = 256
# Slabs multiplied at a time: each leaves a k × k matrix until they are added up.
_SLABS = 16
# From this width on, the products left out outweigh the calls added.
_WIDE = 128
_BLOCKS = 4


def cost(n: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * k * k, bytes=itemsize * n * k + 8 * k * k)


def gram_torch(panel: Tensor) -> Tensor:
    """Return ``panel.mT @ panel`` in float64, a slab of rows at a time."""
    k = panel.shape[-1]
    total = panel.new_zeros(*panel.shape[:-2], k, k, dtype=torch.float64)
    for slab in panel.split(_ROWS, dim=-2):
        total = total + _gram_of_slab(slab.double())
    return total


def rounded_gram(panel: Tensor) -> Tensor:
    """Return ``panel.mT @ panel``, computed in the dtype of the panel a slab of rows at a time, in float64.

    At twice the speed of `gram_torch` or better, it is as good for a panel whose columns do not lean on one another.
    """
    n = panel.shape[-2]
    whole = n // _ROUNDED_ROWS * _ROUNDED_ROWS
    rest = panel[..., whole:, :]
    parts = [] if 0 < whole == n else [rest.mT @ rest]
    if whole:
        slabs = panel[..., :whole, :].unflatten(-2, (-1, _ROUNDED_ROWS))
        parts += [_sum_of_grams(some) for some in slabs.split(_SLABS, dim=-3)]
    total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return total.double()


def _sum_of_grams(slabs: Tensor) -> Tensor:
    """Return the sum of the Gram matrices of slabs (..., slabs, rows, k)."""
    products = torch.bmm(slabs.mT, slabs) if slabs.ndim == 3 else slabs.mT @ slabs
    return products.sum(-3)


def _gram_of_slab(slab: Tensor) -> Tensor:
    """Return the Gram matrix of a slab; of a wide one only the blocks on and above the diagonal are computed."""
    k = slab.shape[-1]
    if k < _WIDE:
        return slab.mT @ slab
    block = -(-k // _BLOCKS)
    gram = slab.new_empty(*slab.shape[:-2], k, k)
    for start in range(0, k, block):
        rows, rest = slice(start, start + block), slice(start, k)
        product = slab[..., rows].mT @ slab[..., rest]
        gram[..., rows, rest] = product
        gram[..., rest, rows] = product.mT
    return gram


gram = op("gram(Tall[n,k] panel) -> Small[k,k]", cost)(gram_torch)


@gram.triton
def _launch(panel: Matrices) -> Tensor:
    from brandla_kernels._kernels.inner_product import gram

    return gram(panel)


@gram.gradient
def _gradient(inputs: tuple[Tensor], gradients: tuple[Tensor]) -> tuple[Tensor]:
    return (gram_gradient(inputs[0], gradients[0]),)


def gram_gradient(panel: Tensor, gradient: Tensor) -> Tensor:
    """Gradient with respect to P of a function whose gradient with respect to PᵀP is given."""
    return panel @ (gradient + gradient.mT).to(panel.dtype)
