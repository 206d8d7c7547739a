"""``gram``: G = PᵀP, summed in float64.

P is (..., n, k), G is (..., k, k). P is read once.
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op


def cost(n: int, k: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * k * k, bytes=itemsize * n * k + 8 * k * k)


def gram_torch(panel: Tensor) -> Tensor:
    """Return ``panel.mT @ panel`` in float64."""
    wide = panel.double()
    return wide.mT @ wide


gram = op("gram(Tensor panel) -> Tensor", cost)(gram_torch)
