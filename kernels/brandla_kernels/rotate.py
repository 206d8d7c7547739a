"""``rotate``: V = U W₁ + P W₂, without concatenating [U, P]; and ``rotate_``, which overwrites U with it.

U is (..., n, r), P is (..., n, k), W₁ is (..., r, s), W₂ is (..., k, s), V is (..., n, s).
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels._signature import Matrices

# Rows rotated at a time in place: the temporary stays small.
_ROWS = 1024
# Parts that the kernels take a basis in: launches, against the size of the temporary.
_SLABS = 4


def cost(n: int, r: int, k: int, s: int, itemsize: int = 4) -> Cost:
    """Work of one call."""
    return Cost(flops=2 * n * (r + k) * s, bytes=itemsize * (n * r + n * k + n * s + (r + k) * s))


def rotate_torch(basis: Tensor, panel: Tensor, basis_rotation: Tensor, panel_rotation: Tensor) -> Tensor:
    """Return ``basis @ basis_rotation + panel @ panel_rotation``."""
    rotated = basis @ basis_rotation
    if rotated.ndim == 2 and not rotated.requires_grad:
        return rotated.addmm_(panel, panel_rotation)
    return rotated + panel @ panel_rotation


rotate = op(
    "rotate(Tall[n,r] basis, Tall[n,k] panel, Small[r,s] basis_rotation, Small[k,s] panel_rotation) -> Tall[n,s]",
    cost,
)(rotate_torch)


@op(
    "rotate_(Tall[n,r]! basis, Tall[n,k] panel, Small[r,r] basis_rotation, Small[k,r] panel_rotation) -> ()",
    cost,
)
def rotate_(basis: Tensor, panel: Tensor, basis_rotation: Tensor, panel_rotation: Tensor) -> None:
    """Overwrite ``basis`` with ``basis @ basis_rotation + panel @ panel_rotation``, a slab of rows at a time."""
    for old, new in zip(basis.split(_ROWS, dim=-2), panel.split(_ROWS, dim=-2), strict=True):
        old.copy_(rotate_torch(old, new, basis_rotation, panel_rotation))


@rotate.triton
def _launch(basis: Matrices, panel: Matrices, basis_rotation: Tensor, panel_rotation: Tensor) -> Matrices:
    from brandla_kernels._kernels.tall_product import Term, tall_product

    return tall_product([Term(basis, basis_rotation), Term(panel, panel_rotation)])


@rotate_.triton
def _launch_in_place(basis: Matrices, panel: Matrices, basis_rotation: Tensor, panel_rotation: Tensor) -> None:
    from brandla_kernels._kernels.tall_product import Term, tall_product

    if isinstance(basis, list):
        rotated = tall_product([Term(basis, basis_rotation), Term(panel, panel_rotation)], as_wide_as=basis)
        torch._foreach_copy_(basis, list(rotated))
        return
    assert isinstance(panel, Tensor)
    slab = max(_ROWS, -(-basis.shape[-2] // _SLABS))
    for old, new in zip(basis.split(slab, dim=-2), panel.split(slab, dim=-2), strict=True):
        rotated = tall_product([Term(old, basis_rotation), Term(new, panel_rotation)])
        assert isinstance(rotated, Tensor)
        old.copy_(rotated)


@rotate.gradient
def _gradient(inputs: tuple[Tensor, Tensor, Tensor, Tensor], gradients: tuple[Tensor]) -> tuple[Tensor, ...]:
    basis, panel, basis_rotation, panel_rotation = inputs
    (gradient,) = gradients
    return gradient @ basis_rotation.mT, gradient @ panel_rotation.mT, basis.mT @ gradient, panel.mT @ gradient
