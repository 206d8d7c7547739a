"""``residual``: P = A − U C and, while P is at hand, its Gram matrix PᵀP in float64.

U is (..., n, r), C is (..., r, k), A and P are (..., n, k), the Gram matrix is (..., k, k). The Gram matrix is summed
in float64 whatever the data: a Cholesky factor of it then resolves columns down to the rounding noise of float32 data
(``docs/orthonormalisation.md``), which a float32 Gram matrix does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels.gram import gram_torch


def cost(n: int, r: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * r * k + 2 * n * k * k, bytes=itemsize * (n * r + 2 * n * k + r * k) + 8 * k * k)


@op("residual(Tensor basis, Tensor columns, Tensor coefficients) -> (Tensor, Tensor)", cost)
def residual(basis: Tensor, columns: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``columns - basis @ coefficients`` and its float64 Gram matrix."""
    panel = subtract_product(columns, basis, coefficients)
    return panel, gram_torch(panel)


def subtract_product(columns: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``columns - basis @ coefficients`` in as few passes as torch offers."""
    if columns.ndim == 2:
        return torch.addmm(columns, basis, coefficients, alpha=-1)
    return columns - basis @ coefficients
