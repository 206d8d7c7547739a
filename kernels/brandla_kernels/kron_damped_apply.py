"""``kron_damped_apply``: Y = (β_L I + U_L H_L U_Lᵀ) W (β_R I + U_R H_R U_Rᵀ).

W and Y are (..., p, q), U_L is (..., p, r_L), U_R is (..., q, r_R); H is diagonal (..., r) or symmetric (..., r, r).
W is needed for the two projections U_LᵀW and W U_R, which one pass can share, and once more for the sum; the term with
both bases is folded into the left one:

Y = β_L β_R W + U_L H_L (β_R U_LᵀW + (U_LᵀW U_R) H_R U_Rᵀ) + (β_L W U_R) H_R U_Rᵀ
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._op import Cost, op
from brandla_kernels.damped_apply import apply_middle


def cost(p: int, q: int, left_rank: int, right_rank: int, itemsize: int = 4) -> Cost:
    """Work of one call with diagonal H, leaving out terms without the factor p·q."""
    return Cost(flops=4 * p * q * (left_rank + right_rank), bytes=itemsize * 3 * p * q)


@op(
    "kron_damped_apply(Tensor left_basis, Tensor left_middle, Tensor left_complement, Tensor right_basis,"
    " Tensor right_middle, Tensor right_complement, Tensor matrix) -> Tensor",
    cost,
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
    right_inner = _times_middle(right_basis, right_middle, left_scale * right_projection)
    return (
        left_scale * right_scale * matrix
        + left_basis @ apply_middle(left_basis, left_middle, left_inner)
        + right_inner @ right_basis.mT
    )


def _times_middle(basis: Tensor, middle: Tensor, rows: Tensor) -> Tensor:
    return apply_middle(basis, middle, rows.mT).mT
