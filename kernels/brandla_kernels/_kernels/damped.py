"""The damped applications: projections with their coefficients, a product with Z, and the last sum.

One side, or both sides of a pair: two launches for the projections (`damped_projection`), and one tall product a side.
Of one W, with T = Z_R U_Rᵀ, X = W U_R and Y = Z_L U_LᵀW,

    OUT = β_L β_R (W + U_L (Y + (Z_L U_LᵀX) T) + X T),

two launches for Y, X, Z_L U_LᵀX and T, one for the sum in the inner brackets, and one for the outer. W is read three
times: for U_LᵀW, for W U_R, and for the sum. One pass for both projections would have to write a part of U_LᵀW for
every block of BLOCK_N rows of W and read it again, 2·r_L/BLOCK_N times the size of W: more than the pass it saves from
r_L = BLOCK_N/2 on, and at the ranks this is for the products take longer than either.
"""

from __future__ import annotations

from torch import Tensor

from brandla_kernels._kernels.damped_projection import Half, project, project_both
from brandla_kernels._kernels.tall_product import Term, tall_product
from brandla_kernels._signature import Matrices


def damped_apply(basis: Matrices, middle: Tensor, scale: Tensor, rhs: Matrices) -> Matrices:
    """Return β (V + U Z UᵀV)."""
    return _apply(Half(basis, rhs, middle, (scale,)))[0]


def damped_inverse(basis: Matrices, small: Matrices, damping: Tensor, tail: Tensor, rhs: Matrices) -> Matrices:
    """Return the same with the Z and β of an inverse."""
    return _apply(Half(basis, rhs, small, (damping, tail)))[0]


def pair_damped_inverse(
    left_basis: Matrices, left_small: Matrices, left_damping: Tensor, left_tail: Tensor,
    right_basis: Matrices, right_small: Matrices, right_damping: Tensor, right_tail: Tensor,
    left_rhs: Matrices, right_rhs: Matrices,
) -> tuple[Matrices, Matrices]:  # fmt: skip
    """Return two of them."""
    left = Half(left_basis, left_rhs, left_small, (left_damping, left_tail))
    first, second = _apply(left, Half(right_basis, right_rhs, right_small, (right_damping, right_tail)))
    return first, second


def kron_damped_apply(
    left_basis: Matrices, left_middle: Tensor, left_scale: Tensor,
    right_basis: Matrices, right_middle: Tensor, right_scale: Tensor,
    matrix: Matrices,
) -> Matrices:  # fmt: skip
    """Return the left operator times W times the right operator."""
    left = Half(left_basis, matrix, left_middle, (left_scale,))
    return _apply_both(left, Half(right_basis, _transposed(matrix), right_middle, (right_scale,)))


def kron_damped_inverse(
    left_basis: Matrices, left_small: Matrices, left_damping: Tensor, left_tail: Tensor,
    right_basis: Matrices, right_small: Matrices, right_damping: Tensor, right_tail: Tensor,
    matrix: Matrices,
) -> Matrices:  # fmt: skip
    """Return the same with the Z and β of inverses."""
    left = Half(left_basis, matrix, left_small, (left_damping, left_tail))
    return _apply_both(left, Half(right_basis, _transposed(matrix), right_small, (right_damping, right_tail)))


def _apply(*halves: Half) -> list[Matrices]:
    return [
        tall_product([Term(half.basis, inner)], add=half.rhs, scales=(scale,))
        for half, (inner, scale) in zip(halves, project(halves), strict=True)
    ]


def _apply_both(left: Half, right: Half) -> Matrices:
    (rows, left_scale), (columns, right_scale), both, turned = project_both(left, right)
    inner = tall_product([Term(both, turned)], add=rows, as_wide_as=rows)
    terms = [Term(left.basis, inner), Term(columns, turned)]
    return tall_product(terms, add=left.rhs, scales=(left_scale, right_scale))


def _transposed(matrix: Matrices) -> Matrices:
    return matrix.mT if isinstance(matrix, Tensor) else [one.mT for one in matrix]
