"""``gram_ema_``: M ← ρ M + w A Aᵀ in place: the dense running second moment.

M is symmetric (..., n, n) in float32 or float64, A is (..., n, k) in the same dtype or, beside float32, in half
precision. On a GPU, only the tiles of one triangle are computed, and each is written twice. This halves the products
and the reads of M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op


def cost(n: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call, both triangles counted."""
    return Cost(flops=2 * n * n * k, bytes=itemsize * (2 * n * n + n * k))


@op(
    "gram_ema_(Tall[n,n]! matrix, Data[n,k] columns, float decay, float weight) -> ()",
    cost,
    "symmetric_update.symmetric_update",
)
def gram_ema_(matrix: Tensor, columns: Tensor, decay: float, weight: float) -> None:
    """Overwrite ``matrix`` with ``decay * matrix + weight * columns @ columns.mT``.

    ``matrix`` must be symmetric up to rounding: the kernels read one triangle of it, and leave it symmetric to the bit.
    """
    data = columns.to(matrix.dtype)
    # BLAS does not read a matrix that it multiplies by 0, and would lose NaN in it.
    if matrix.ndim == 2 and decay and weight:
        torch.addmm(matrix, data, data.mT, beta=decay, alpha=weight, out=matrix)
    else:
        matrix.mul_(decay).add_(data @ data.mT, alpha=weight)
