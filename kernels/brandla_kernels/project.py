"""``project``: C = Uᵀ A, the coefficients of new columns in a tall basis.

U is (..., n, r), A is (..., n, k), C is (..., r, k). Both tall matrices are read once.
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op


def cost(n: int, r: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * r * k, bytes=itemsize * (n * r + n * k + r * k))


@op("project(Tensor basis, Tensor columns) -> Tensor", cost)
def project(basis: Tensor, columns: Tensor) -> Tensor:
    """Return ``basis.mT @ columns``."""
    return basis.mT @ columns
