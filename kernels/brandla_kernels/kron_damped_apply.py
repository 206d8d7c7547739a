"""``kron_damped_apply``: Y = β_L (I + U_L Z_L U_Lᵀ) W (I + U_R Z_R U_Rᵀ) β_R.

W and Y are (..., p, q), U_L is (..., p, r_L), U_R is (..., q, r_R); Z is diagonal (..., r) or symmetric (..., r, r).
W is read for the two projections U_LᵀW and W U_R, which can share one pass, and once more for the sum. The term with
both bases is folded into the left one:

Y = β_L β_R (W + U_L Z_L (U_LᵀW + (U_LᵀW U_R) Z_R U_Rᵀ) + (W U_R) Z_R U_Rᵀ)
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels.damped_apply import (
    apply_middle,
    damped_apply,
    damped_apply_gradient,
    scaled_sum,
    transposed_middle,
)


def cost(p: int, q: int, left_rank: int, right_rank: int, itemsize: int = 4) -> Cost:
    """Work of one call with diagonal Z, without the terms that lack the factor p·q."""
    return Cost(flops=4 * p * q * (left_rank + right_rank), bytes=itemsize * 3 * p * q)


@op(
    "kron_damped_apply(Tall[p,a] left_basis, Small[a|a,a] left_middle, Small[] left_scale,"
    " Tall[q,b] right_basis, Small[b|b,b] right_middle, Small[] right_scale, Tall[p,q] matrix) -> Tall[p,q]",
    cost,
    "damped.kron_damped",
)
def kron_damped_apply(
    left_basis: Tensor, left_middle: Tensor, left_scale: Tensor,
    right_basis: Tensor, right_middle: Tensor, right_scale: Tensor,
    matrix: Tensor,
) -> Tensor:  # fmt: skip
    """Return the left operator times ``matrix`` times the right operator."""
    left_projection = left_basis.mT @ matrix
    right_projection = matrix @ right_basis
    both = left_basis.mT @ right_projection
    left_inner = left_projection + _times_middle(right_basis, right_middle, both) @ right_basis.mT
    left_inner = apply_middle(left_basis, left_middle, left_inner)
    right_inner = _times_middle(right_basis, right_middle, right_projection)
    # One product adds both terms in one pass over Y.
    columns, rows = torch.cat([left_basis, right_inner], -1), torch.cat([left_inner, right_basis.mT], -2)
    return scaled_sum(left_scale * right_scale, matrix, columns, rows)


def _times_middle(basis: Tensor, middle: Tensor, rows: Tensor) -> Tensor:
    """Multiply ``rows`` (..., k, r) by Z from the right."""
    return apply_middle(basis, middle, rows.mT).mT


def kron_damped_apply_gradient(inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients with respect to all arguments, given the one with respect to Y."""
    left, right, matrix = (inputs[0], inputs[1], inputs[2]), (inputs[3], inputs[4], inputs[5]), inputs[6]
    apply = damped_apply.torch_form
    from_right = apply(*right, matrix.mT).mT
    *of_left, of_matrix = damped_apply_gradient(*left, from_right, gradient)
    *of_right, _ = damped_apply_gradient(*right, apply(*left, matrix).mT, gradient.mT)
    basis, middle, scale = right
    return *of_left, *of_right, apply(basis, transposed_middle(basis, middle), scale, of_matrix.mT).mT


kron_damped_apply.gradient(lambda inputs, gradients: kron_damped_apply_gradient(inputs, *gradients))
