"""``kron_damped_apply``: Y = (β_L I + U_L H_L U_Lᵀ) W (β_R I + U_R H_R U_Rᵀ).

W and Y are (..., p, q), U_L is (..., p, r_L), U_R is (..., q, r_R); H is diagonal (..., r) or symmetric (..., r, r).
W is needed for the two projections U_LᵀW and W U_R, which one pass can share, and once more for the sum; the term with
both bases is folded into the left one:

Y = β_L β_R W + U_L H_L (β_R U_LᵀW + (U_LᵀW U_R) H_R U_Rᵀ) + (β_L W U_R) H_R U_Rᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels.damped_apply import apply_middle, damped_apply, damped_apply_gradient, transposed_middle


def cost(p: int, q: int, left_rank: int, right_rank: int, itemsize: int = 4) -> Cost:
    """Work of one call with diagonal H, leaving out terms without the factor p·q."""
    return Cost(flops=4 * p * q * (left_rank + right_rank), bytes=itemsize * 3 * p * q)


@op(
    "kron_damped_apply(Tall[p,a] left_basis, Small[a|a,a] left_middle, Small[] left_complement,"
    " Tall[q,b] right_basis, Small[b|b,b] right_middle, Small[] right_complement, Tall[p,q] matrix) -> Tall[p,q]",
    cost,
    "damped.kron_damped_apply",
)
def kron_damped_apply(
    left_basis: Tensor,
    left_middle: Tensor,
    left_complement: Tensor,
    right_basis: Tensor,
    right_middle: Tensor,
    right_complement: Tensor,
    matrix: Tensor,
) -> Tensor:
    """Return the left operator times ``matrix`` times the right operator."""
    left_scale = left_complement[..., None, None]
    right_scale = right_complement[..., None, None]
    left_projection = left_basis.mT @ matrix
    right_projection = matrix @ right_basis
    both = left_basis.mT @ right_projection
    left_inner = right_scale * left_projection + _times_middle(right_basis, right_middle, both) @ right_basis.mT
    left_inner = apply_middle(left_basis, left_middle, left_inner)
    right_inner = _times_middle(right_basis, right_middle, left_scale * right_projection)
    scaled = left_scale * right_scale * matrix
    parts = (scaled, left_inner, right_inner)
    if all(part.ndim == 2 and not part.requires_grad for part in parts):
        # In place, and both terms in one pass over Y.
        columns, rows = torch.cat([left_basis, right_inner], -1), torch.cat([left_inner, right_basis.mT])
        return scaled.addmm_(columns, rows)
    return scaled + left_basis @ left_inner + right_inner @ right_basis.mT


def _times_middle(basis: Tensor, middle: Tensor, rows: Tensor) -> Tensor:
    return apply_middle(basis, middle, rows.mT).mT


@kron_damped_apply.gradient
def _gradient(inputs: tuple[Tensor, ...], gradients: tuple[Tensor]) -> tuple[Tensor, ...]:
    left, right = (inputs[0], inputs[1], inputs[2]), (inputs[3], inputs[4], inputs[5])
    matrix, gradient = inputs[6], gradients[0]
    apply = damped_apply.torch_form
    from_right = apply(*right, matrix.mT).mT
    *of_left, of_matrix = damped_apply_gradient(*left, from_right, gradient)
    *of_right, _ = damped_apply_gradient(*right, apply(*left, matrix).mT, gradient.mT)
    basis, middle, complement = right
    return *of_left, *of_right, apply(basis, transposed_middle(basis, middle), complement, of_matrix.mT).mT
