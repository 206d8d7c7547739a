"""``damped_apply``: Y = β (V + U Z UᵀV), a shifted low-rank operator applied to a block of vectors.

U is (..., n, r), V and Y are (..., n, m), β (...,) is one number per batch entry. Z is diagonal, given as (..., r), or
a small symmetric matrix (..., r, r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op, reads_are_free
from brandla_kernels.gram import inner_product


def cost(n: int, r: int, m: int, itemsize: int = 4) -> Cost:
    """Work of one call with a diagonal Z."""
    return Cost(flops=4 * n * r * m + 2 * n * m, bytes=itemsize * (n * r + 2 * n * m))


@op(
    "damped_apply(Tall[n,r] basis, Small[r|r,r] middle, Small[] scale, Tall[n,m] rhs) -> Tall[n,m]",
    cost,
    "damped.damped",
)
def damped_apply(basis: Tensor, middle: Tensor, scale: Tensor, rhs: Tensor) -> Tensor:
    """Return ``scale * (rhs + basis @ (middle · (basis.mT @ rhs)))``."""
    inner = apply_middle(basis, middle, inner_product(basis, rhs))
    return scaled_sum(scale, rhs, basis, inner)


def scaled_sum(scale: Tensor, added: Tensor, tall: Tensor, small: Tensor) -> Tensor:
    """Return β (A + X Y). For matrices on a CPU, only the product passes over memory."""
    is_matrix = added.ndim == tall.ndim == small.ndim == 2
    # With β = 0, addmm would not read A, and would lose NaN in it.
    if is_matrix and reads_are_free(scale) and not scale.requires_grad and (number := scale.item()) != 0:
        return torch.addmm(added, tall, small, beta=number, alpha=number)
    return (added + tall @ small).mul_(scale[..., None, None])


def apply_middle(basis: Tensor, middle: Tensor, coefficients: Tensor) -> Tensor:
    """Multiply ``coefficients`` (..., r, m) by Z, which is diagonal if it has one dimension less than ``basis``."""
    if middle.ndim < basis.ndim:
        return middle[..., None] * coefficients
    return middle @ coefficients


def transposed_middle(basis: Tensor, middle: Tensor) -> Tensor:
    """Return Zᵀ, which is Z itself if Z is diagonal."""
    return middle if middle.ndim < basis.ndim else middle.mT


def damped_apply_gradient(
    basis: Tensor, middle: Tensor, scale: Tensor, rhs: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with respect to U, Z, β and V, given the one with respect to Y."""
    scaled = scale[..., None, None] * gradient
    coefficients, projected = inner_product(basis, rhs), inner_product(basis, gradient)
    inner = apply_middle(basis, middle, coefficients)
    of_scale = (gradient * rhs).sum((-2, -1)) + (projected * inner).sum((-2, -1))
    of_inner = scale[..., None, None] * projected
    of_coefficients = apply_middle(basis, transposed_middle(basis, middle), of_inner)
    of_middle = (of_inner * coefficients).sum(-1) if middle.ndim < basis.ndim else of_inner @ coefficients.mT
    of_basis = scaled @ inner.mT + rhs @ of_coefficients.mT
    return of_basis, of_middle, of_scale, scaled + basis @ of_coefficients


damped_apply.gradient(lambda inputs, gradients: damped_apply_gradient(*inputs, *gradients))
