"""``cross_gram``: C = FᵀA and G = AᵀA in float64, the inner products of new columns A with a root F and one another.

F is (..., n, r), A is (..., n, k), C is (..., r, k), G is (..., k, k). F and A are read once. With M̂ = F Fᵀ and
S = FᵀF, [S, C; Cᵀ, G] is the Gram matrix of [F, A]. An update of the square root F needs nothing else of the tall
matrices.

Products are summed in the dtype of F within a slab of rows, and in float64 between slabs. The error is some ε,
relative to the largest entry, at any n and for float32 columns of any norm: if products would leave the range of
float32, they are taken in float64 here, and of scaled columns in the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from brandla_kernels import tall
from brandla_kernels._op import Cost, op, reads_are_free
from brandla_kernels.gram import gram_gradient, slab_rows, sum_of_slabs


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
def _list_form(one_by_one: Callable[..., Any], roots: list[Tensor], columns: list[Tensor]) -> Any:
    """Stack the products of float32 matrices of equal widths, to check and convert them together."""
    first, pairs = columns[0], list(zip(roots, columns, strict=True))
    same_widths = len({(root.shape[-1], panel.shape[-1]) for root, panel in pairs}) == 1
    are_float32 = {matrix.dtype for matrix in (*roots, *columns)} == {torch.float32}
    most = tall.rows(columns)
    if same_widths and are_float32 and reads_are_free(first) and most <= slab_rows(roots[0], first):
        inner = torch.stack([panel.mT @ panel for panel in columns])
        if _keeps_precision(inner, most):
            return torch.stack([root.mT @ panel for root, panel in pairs]).double(), inner.double()
    return one_by_one(roots, columns)


def _keeps_precision(inner: Tensor, n: int) -> bool:
    """Say whether sums of n float32 squares neither overflowed nor vanished: each square may lose a denormal number.

    Then products with a root are in range too, if the root's own squares are.
    """
    if inner.numel() == 0:
        return True
    inner = inner.detach() if inner.requires_grad else inner
    largest = inner.diagonal(dim1=-2, dim2=-1).amax(-1)
    squares = [extreme.item() for extreme in largest.aminmax()] if largest.ndim else [largest.item()]
    info = torch.finfo(torch.float32)
    return n * info.tiny / info.eps <= squares[0] and squares[-1] < math.inf


@cross_gram.gradient
def _gradient(inputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    root, columns = inputs[0], inputs[1].to(inputs[0].dtype)
    cross = gradients[0].to(root.dtype)
    return columns @ cross.mT, root @ cross + gram_gradient(columns, gradients[1])
