"""``damped_apply``: Y = β V + U H (UᵀV), a shifted low-rank operator applied to a block of vectors.

U is (..., n, r), V and Y are (..., n, m), β is a scalar a batch entry (...,). H is diagonal, given as (..., r), or a
small symmetric matrix (..., r, r).
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels.gram import inner_product


def cost(n: int, r: int, m: int, itemsize: int = 4) -> Cost:
    """Work of one call with a diagonal H."""
    return Cost(flops=4 * n * r * m + 2 * n * m, bytes=itemsize * (n * r + 2 * n * m))


@op(
    "damped_apply(Tall[n,r] basis, Small[r|r,r] middle, Small[] complement, Tall[n,m] rhs) -> Tall[n,m]",
    cost,
    "damped.damped_apply",
)
def damped_apply(basis: Tensor, middle: Tensor, complement: Tensor, rhs: Tensor) -> Tensor:
    """Return ``complement * rhs + basis @ (middle · (basis.mT @ rhs))``."""
    inner = apply_middle(basis, middle, inner_product(basis, rhs))
    scaled = complement[..., None, None] * rhs
    if basis.ndim == scaled.ndim == inner.ndim == 2 and not (scaled.requires_grad or inner.requires_grad):
        return scaled.addmm_(basis, inner)
    return scaled + basis @ inner


def apply_middle(basis: Tensor, middle: Tensor, coefficients: Tensor) -> Tensor:
    """Multiply ``coefficients`` (..., r, m) by H, diagonal when it has one dimension less than ``basis``."""
    if middle.ndim < basis.ndim:
        return middle[..., None] * coefficients
    return middle @ coefficients


def transposed_middle(basis: Tensor, middle: Tensor) -> Tensor:
    """Return Hᵀ, of a diagonal H itself."""
    return middle if middle.ndim < basis.ndim else middle.mT


@damped_apply.gradient
def _gradient(inputs: tuple[Tensor, Tensor, Tensor, Tensor], gradients: tuple[Tensor]) -> tuple[Tensor, ...]:
    return damped_apply_gradient(*inputs, gradients[0])


def damped_apply_gradient(
    basis: Tensor, middle: Tensor, complement: Tensor, rhs: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to U, H, β and V, from that with respect to Y."""
    coefficients, pulled = inner_product(basis, rhs), inner_product(basis, gradient)
    inner = apply_middle(basis, transposed_middle(basis, middle), pulled)
    of_basis = gradient @ apply_middle(basis, middle, coefficients).mT + rhs @ inner.mT
    of_middle = (pulled * coefficients).sum(-1) if middle.ndim < basis.ndim else pulled @ coefficients.mT
    of_complement = (gradient * rhs).sum((-2, -1))
    return of_basis, of_middle, of_complement, complement[..., None, None] * gradient + basis @ inner
