"""``rotate``: V = U W₁ + P W₂, without concatenating [U, P]; and ``rotate_``, which overwrites U with it.

U is (..., n, r), P is (..., n, k), W₁ is (..., r, s), W₂ is (..., k, s), V is (..., n, s).
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, is_mapped, op

# Rows rotated at a time in place, so that the temporary stays small.
ROWS_AT_A_TIME = 1024


def cost(n: int, r: int, k: int, s: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * (r + k) * s, bytes=itemsize * (n * r + n * k + n * s + (r + k) * s))


@op(
    "rotate(Tall[n,r] basis, Tall[n,k] panel, Small[r,s] basis_rotation, Small[k,s] panel_rotation) -> Tall[n,s]",
    cost,
    "tall_product.rotate",
)
def rotate(basis: Tensor, panel: Tensor, basis_rotation: Tensor, panel_rotation: Tensor) -> Tensor:
    """Return ``basis @ basis_rotation + panel @ panel_rotation``."""
    rotated = basis @ basis_rotation
    if rotated.ndim == 2 and not rotated.requires_grad and not is_mapped(rotated):
        return rotated.addmm_(panel, panel_rotation)
    return rotated + panel @ panel_rotation


@op(
    "rotate_(Tall[n,r]! basis, Tall[n,k] panel, Small[r,r] basis_rotation, Small[k,r] panel_rotation) -> ()",
    cost,
    "tall_product.rotate_",
)
def rotate_(basis: Tensor, panel: Tensor, basis_rotation: Tensor, panel_rotation: Tensor) -> None:
    """Overwrite ``basis`` with ``basis @ basis_rotation + panel @ panel_rotation``, a slab of rows at a time."""
    slabs = zip(basis.split(ROWS_AT_A_TIME, dim=-2), panel.split(ROWS_AT_A_TIME, dim=-2), strict=True)
    for old, new in slabs:
        old.copy_(rotate.torch_form(old, new, basis_rotation, panel_rotation))


@rotate.gradient
def _gradient(inputs: tuple[Tensor, Tensor, Tensor, Tensor], gradients: tuple[Tensor]) -> tuple[Tensor, ...]:
    basis, panel, basis_rotation, panel_rotation = inputs
    (gradient,) = gradients
    return gradient @ basis_rotation.mT, gradient @ panel_rotation.mT, basis.mT @ gradient, panel.mT @ gradient
