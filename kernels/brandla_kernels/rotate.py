"""``rotate``: V = U W₁ + P W₂, without concatenating [U, P]; and ``rotate_``, which overwrites U with it.

U is (..., n, r), P is (..., n, k), W₁ is (..., r, s), W₂ is (..., k, s), V is (..., n, s).
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op

# Rows rotated at a time in place: the temporary stays small.
_ROWS = 1024


def cost(n: int, r: int, k: int, s: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * (r + k) * s, bytes=itemsize * (n * r + n * k + n * s + (r + k) * s))


def rotate_torch(basis: Tensor, panel: Tensor, basis_rotation: Tensor, panel_rotation: Tensor) -> Tensor:
    """Return ``basis @ basis_rotation + panel @ panel_rotation``."""
    rotated = basis @ basis_rotation
    if rotated.ndim == 2 and not rotated.requires_grad:
        return rotated.addmm_(panel, panel_rotation)
    return rotated + panel @ panel_rotation


rotate = op("rotate(Tensor basis, Tensor panel, Tensor basis_rotation, Tensor panel_rotation) -> Tensor", cost)(
    rotate_torch
)


@op("rotate_(Tensor(a!) basis, Tensor panel, Tensor basis_rotation, Tensor panel_rotation) -> ()", cost)
def rotate_(basis: Tensor, panel: Tensor, basis_rotation: Tensor, panel_rotation: Tensor) -> None:
    """Overwrite ``basis`` with ``basis @ basis_rotation + panel @ panel_rotation``, a slab of rows at a time."""
    for old, new in zip(basis.split(_ROWS, dim=-2), panel.split(_ROWS, dim=-2), strict=True):
        old.copy_(rotate_torch(old, new, basis_rotation, panel_rotation))
