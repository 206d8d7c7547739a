"""``cross_gram``: C = FᵀA and G = AᵀA, both in float64: what new columns have in common with a root and one another.

F is (..., n, r), A is (..., n, k), C is (..., r, k), G is (..., k, k). F and A are read once. With M̂ = F Fᵀ and
S = FᵀF, [S, C; Cᵀ, G] is the Gram matrix of [F, A], and all that an update of the square root F needs of the tall
matrices.

Products are in the dtype of F within a slab of rows, and summed in float64 between slabs: an error of some ε, relative
to the largest entry, at any n. That holds for float32 columns of any length: where products would leave the range of
float32, they are taken in float64 here, and of scaled columns by the kernel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op, reads_are_free
from brandla_kernels._signature import Matrices
from brandla_kernels.gram import gram_gradient, sum_of_slabs


def cost(n: int, r: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * r * k + 2 * n * k * k, bytes=itemsize * (n * r + n * k) + 8 * (r * k + k * k))


def cross_gram_torch(root: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``root.mT @ columns`` and ``columns.mT @ columns`` in float64, a slab of rows at a time."""
    return _in_any_range(root, columns, root.dtype), _in_any_range(columns, columns, root.dtype)


def _in_any_range(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``left.mT @ right``, of products in ``dtype`` where these keep their precision, and else in float64."""
    if dtype == torch.float64 or not reads_are_free(left):
        return sum_of_slabs(left, right, torch.float64)
    product = sum_of_slabs(left, right, dtype)
    return product if _keeps_precision(product, left, right) else sum_of_slabs(left, right, torch.float64)


def _keeps_precision(product: Tensor, left: Tensor, right: Tensor) -> bool:
    """Say whether float32 products neither overflowed nor vanished: n of them may lose a denormal number each."""
    if product.numel() == 0:
        return True
    smallest, largest = product.detach().flatten(-2).aminmax(dim=-1)
    pairs = zip(smallest.flatten().tolist(), largest.flatten().tolist(), strict=True)
    peaks = [max(high, -low) for low, high in pairs]
    info = torch.finfo(torch.float32)
    least = left.shape[-2] * info.tiny / info.eps
    if all(least <= peak < math.inf for peak in peaks):
        return True
    # A root that nothing has come into yet has no products to lose.
    empty = ~(left.any(-1).any(-1) & right.any(-1).any(-1))
    return all(
        least <= peak < math.inf or (peak == 0 and none)
        for peak, none in zip(peaks, empty.flatten().tolist(), strict=True)
    )


cross_gram = op("cross_gram(Tall[n,r] root, Data[n,k] columns) -> (Small[r,k], Small[k,k])", cost)(cross_gram_torch)


@cross_gram.triton
def _launch(root: Matrices, columns: Matrices) -> tuple[Tensor, Tensor]:
    from brandla_kernels._kernels.cross_gram import cross_gram

    return cross_gram(root, columns)


@cross_gram.gradient
def _gradient(inputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    root, columns = inputs[0], inputs[1].to(inputs[0].dtype)
    cross = gradients[0].to(root.dtype)
    return columns @ cross.mT, root @ cross + gram_gradient(columns, gradients[1])
