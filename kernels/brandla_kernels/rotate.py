"""``rotate``: V = U W₁ + P W₂, without concatenating [U, P].

U is (..., n, r), P is (..., n, k), W₁ is (..., r, s), W₂ is (..., k, s), V is (..., n, s).
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op


def cost(n: int, r: int, k: int, s: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * (r + k) * s, bytes=itemsize * (n * r + n * k + n * s + (r + k) * s))


@op("rotate(Tensor basis, Tensor panel, Tensor basis_rotation, Tensor panel_rotation) -> Tensor", cost)
def rotate(basis: Tensor, panel: Tensor, basis_rotation: Tensor, panel_rotation: Tensor) -> Tensor:
    """Return ``basis @ basis_rotation + panel @ panel_rotation``."""
    rotated = basis @ basis_rotation
    if rotated.ndim == 2 and not rotated.requires_grad:
        return rotated.addmm_(panel, panel_rotation)
    return rotated + panel @ panel_rotation
