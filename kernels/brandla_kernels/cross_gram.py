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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from brandla_kernels import tall
from brandla_kernels._op import Cost, op, reads_are_free
from brandla_kernels.gram import gram_gradient, slab, sum_of_slabs


def cost(n: int, r: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * r * k + 2 * n * k * k, bytes=itemsize * (n * r + n * k) + 8 * (r * k + k * k))


@op("cross_gram(Tall[n,r] root, Data[n,k] columns) -> (Small[r,k], Small[k,k])", cost, "cross_gram.cross_gram")
def cross_gram(root: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``root.mT @ columns`` and ``columns.mT @ columns`` in float64, a slab of rows at a time."""
    dtype = root.dtype
    if dtype == torch.float32 and reads_are_free(columns):
        inner = sum_of_slabs(columns, columns, dtype)
        if _keeps_precision(inner, columns.shape[-2]):
            return sum_of_slabs(root, columns, dtype), inner
    return sum_of_slabs(root, columns, torch.float64), sum_of_slabs(columns, columns, torch.float64)


@cross_gram.listed
def _of_list(one_by_one: Callable[..., Any], roots: list[Tensor], columns: list[Tensor]) -> Any:
    """Compute products of float32 matrices of one width each, and look at them and convert them together."""
    first, widths = columns[0], {(root.shape[-1], own.shape[-1]) for root, own in zip(roots, columns, strict=True)}
    are_single = {matrix.dtype for matrix in (*roots, *columns)} == {torch.float32} and reads_are_free(first)
    most = tall.rows(columns)
    if are_single and len(widths) == 1 and most <= slab(roots[0], first):
        inner = torch.stack([own.mT @ own for own in columns])
        if _keeps_precision(inner, most):
            cross = torch.stack([root.mT @ own for root, own in zip(roots, columns, strict=True)])
            return cross.double(), inner.double()
    return one_by_one(roots, columns)


def _keeps_precision(inner: Tensor, n: int) -> bool:
    """Say whether float32 squares neither overflowed nor vanished: n of them may lose a denormal number each.

    Products with a root whose own squares are in range then are so too.
    """
    if inner.numel() == 0:
        return True
    inner = inner.detach() if inner.requires_grad else inner
    longest = inner.diagonal(dim1=-2, dim2=-1).amax(-1)
    lengths = [extreme.item() for extreme in longest.aminmax()] if longest.ndim else [longest.item()]
    info = torch.finfo(torch.float32)
    return n * info.tiny / info.eps <= lengths[0] and lengths[-1] < math.inf


@cross_gram.gradient
def _gradient(inputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    root, columns = inputs[0], inputs[1].to(inputs[0].dtype)
    cross = gradients[0].to(root.dtype)
    return columns @ cross.mT, root @ cross + gram_gradient(columns, gradients[1])
