"""``damped_apply``: Y = β V + U H (UᵀV), a shifted low-rank operator applied to a block of vectors.

U is (..., n, r), V and Y are (..., n, m), β is a scalar a batch entry (...,). H is diagonal, given as (..., r), or a
small symmetric matrix (..., r, r).
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op


def cost(n: int, r: int, m: int, itemsize: int = 4) -> Cost:
    """Work of one call with a diagonal H."""
    return Cost(flops=4 * n * r * m + 2 * n * m, bytes=itemsize * (n * r + 2 * n * m))


@op("damped_apply(Tensor basis, Tensor middle, Tensor complement, Tensor rhs) -> Tensor", cost)
def damped_apply(basis: Tensor, middle: Tensor, complement: Tensor, rhs: Tensor) -> Tensor:
    """Return ``complement * rhs + basis @ (middle · (basis.mT @ rhs))``."""
    inner = apply_middle(basis, middle, basis.mT @ rhs)
    scaled = complement[..., None, None] * rhs
    if basis.ndim == scaled.ndim == inner.ndim == 2 and not (scaled.requires_grad or inner.requires_grad):
        return scaled.addmm_(basis, inner)
    return scaled + basis @ inner


def apply_middle(basis: Tensor, middle: Tensor, coefficients: Tensor) -> Tensor:
    """Multiply ``coefficients`` (..., r, m) by H, diagonal when it has one dimension less than ``basis``."""
    if middle.ndim < basis.ndim:
        return middle[..., None] * coefficients
    return middle @ coefficients
