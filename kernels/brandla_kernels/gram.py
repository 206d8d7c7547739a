"""``gram`` and ``rounded_gram``: G = PᵀP in float64, from exact products or from products rounded to the dtype of P.

P is (..., n, k), G is (..., k, k). P is read once. Rounded products are summed in the dtype of P within slabs of rows,
and in float64 between slabs. The error is some ε at any n: enough for nearly orthonormal columns, at twice the speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op

# Rows converted to float64 at a time: the copy stays small and in cache.
_ROWS = 2048
# From this width on, computing one triangle by blocks saves more than its calls cost.
_WIDE = 128
_BLOCKS = 4
# Rows of a slab, whose products are summed in the dtype of the data. For few columns, BLAS has one accumulator per
# entry, and a sum of 4096 products is wrong by 20 ε. For more columns it sums in blocks, and is wrong by 3 ε at most.
_SLAB_OF_FEW = 1024
_SLAB = 4096
_FEW = 16


def cost(n: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * k * k, bytes=itemsize * n * k + 8 * k * k)


@op("gram(Tall[n,k] panel) -> Small[k,k]", cost, "inner_product.gram")
def gram(panel: Tensor) -> Tensor:
    """Return ``panel.mT @ panel`` in float64, a slab of rows at a time."""
    k = panel.shape[-1]
    total = panel.new_zeros(*panel.shape[:-2], k, k, dtype=torch.float64)
    for slab in panel.split(_ROWS, dim=-2):
        total = total + _gram_of_slab(slab.double())
    return total


def sum_of_slabs(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``left.mT @ right`` in float64: products in ``dtype`` within a slab of rows, float64 sums between slabs.

    A float32 product of few columns with an inner dimension of 10⁶ is wrong by 4·10⁻⁴, this sum by some ε.
    """
    rows = slab_rows(left, right)
    if left.shape[-2] <= rows:
        return (left.to(dtype).mT @ right.to(dtype)).double()
    slabs = zip(left.split(rows, dim=-2), right.split(rows, dim=-2), strict=True)
    products = (x.to(dtype).mT @ y.to(dtype) for x, y in slabs)
    total: Tensor = next(products).double()
    for product in products:
        total += product
    return total


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left.mT @ right`` in the dtype of both, by `sum_of_slabs` if there is more than one slab."""
    if left.shape[-2] <= slab_rows(left, right):
        return left.mT @ right
    return sum_of_slabs(left, right, left.dtype).to(left.dtype)


def slab_rows(left: Tensor, right: Tensor) -> int:
    """Return the number of rows of a slab, whose products are summed in the dtype of the data."""
    if left.dtype == right.dtype == torch.float64:
        return left.shape[-2]
    return _SLAB if min(left.shape[-1], right.shape[-1]) >= _FEW else _SLAB_OF_FEW


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


def gram_gradient(panel: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient with respect to P, given the one with respect to PᵀP."""
    return panel @ (gradient + gradient.mT).to(panel.dtype)


@op("rounded_gram(Tall[n,k] panel) -> Small[k,k]", cost, "inner_product.rounded_gram")
def rounded_gram(panel: Tensor) -> Tensor:
    """Return ``panel.mT @ panel`` in float64, from products in the dtype of the panel."""
    return sum_of_slabs(panel, panel, panel.dtype)


@gram.gradient
@rounded_gram.gradient
def _gradient(inputs: tuple[Tensor], gradients: tuple[Tensor]) -> tuple[Tensor]:
    return (gram_gradient(*inputs, *gradients),)
