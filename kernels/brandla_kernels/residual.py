"""``residual``: P = A − U C and, while P is at hand, its Gram matrix PᵀP in float64.

U is (..., n, r), C is (..., r, k), A and P are (..., n, k), the Gram matrix is (..., k, k). The Gram matrix is summed
in float64 whatever the data: a Cholesky factor of it then resolves columns down to the rounding noise of float32 data
(``docs/updates.md``), which a float32 Gram matrix does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels._signature import Matrices
from brandla_kernels.gram import gram_gradient, gram_torch


def cost(n: int, r: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * r * k + 2 * n * k * k, bytes=itemsize * (n * r + 2 * n * k + r * k) + 8 * k * k)


@op(
    "residual(Tall[n,r] basis, Data[n,k] columns, Small[r,k] coefficients) -> (Tall[n,k], Small[k,k])",
    cost,
)
def residual(basis: Tensor, columns: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``columns - basis @ coefficients`` and its float64 Gram matrix."""
    panel = subtract_product(columns.to(basis.dtype), basis, coefficients)
    return panel, gram_torch(panel)


def subtract_product(columns: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``columns - basis @ coefficients`` in as few passes as torch offers."""
    if columns.ndim == 2:
        return torch.addmm(columns, basis, coefficients, alpha=-1)
    return columns - basis @ coefficients


@residual.triton
def _launch(basis: Matrices, columns: Matrices, coefficients: Tensor) -> tuple[Matrices, Tensor]:
    from brandla_kernels._kernels.tall_product import Term, tall_product_and_gram

    return tall_product_and_gram([Term(basis, coefficients)], add=columns, subtract=True)


@residual.gradient
def _gradient(inputs: tuple[Tensor, Tensor, Tensor], gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    basis, columns, coefficients = inputs
    panel = subtract_product(columns.to(basis.dtype), basis, coefficients)
    gradient = gradients[0] + gram_gradient(panel, gradients[1])
    return -gradient @ coefficients.mT, gradient, -basis.mT @ gradient
