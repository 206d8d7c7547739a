"""``project``: C = Uᵀ A, the coefficients of new columns in a tall basis.

U is (..., n, r), A is (..., n, k), C is (..., r, k). Both tall matrices are read once.
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels.gram import inner_product


def cost(n: int, r: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * r * k, bytes=itemsize * (n * r + n * k + r * k))


@op("project(Tall[n,r] basis, Data[n,k] columns) -> Small[r,k]", cost, "inner_product.project")
def project(basis: Tensor, columns: Tensor) -> Tensor:
    """Return ``basis.mT @ columns``."""
    return inner_product(basis, columns.to(basis.dtype))


@project.gradient
def _gradient(inputs: tuple[Tensor, Tensor], gradients: tuple[Tensor]) -> tuple[Tensor, Tensor]:
    (basis, columns), (gradient,) = inputs, gradients
    return columns.to(basis.dtype) @ gradient.mT, basis @ gradient
