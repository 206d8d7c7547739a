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

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from brandla_kernels._kernels.damped_projection import Half, project, project_both
from brandla_kernels._kernels.tall_product import Term, tall_product
from brandla_kernels._signature import Matrices


def damped(*given: Any) -> Matrices:
    """Return β (V + U Z UᵀV) of U, Z, β and V; of U, d or S, λ, τ and V with the Z and β of an inverse."""
    *side, rhs = given
    return _apply(_half(side, rhs))[0]


def pair_damped(*given: Any) -> tuple[Matrices, Matrices]:
    """Return two of them: of what belongs to the left side, to the right side, and the two V."""
    *sides, left_rhs, right_rhs = given
    left, right = sides[: len(sides) // 2], sides[len(sides) // 2 :]
    first, second = _apply(_half(left, left_rhs), _half(right, right_rhs))
    return first, second


def kron_damped(*given: Any) -> Matrices:
    """Return the left operator times W times the right operator."""
    *sides, matrix = given
    transposed = matrix.mT if isinstance(matrix, Tensor) else [one.mT for one in matrix]
    left, right = _half(sides[: len(sides) // 2], matrix), _half(sides[len(sides) // 2 :], transposed)
    (rows, left_scale), (columns, right_scale), both, turned = project_both(left, right)
    inner = tall_product([Term(both, turned)], add=rows)
    terms = [Term(left.basis, inner), Term(columns, turned)]
    return tall_product(terms, add=matrix, scales=(left_scale, right_scale))


def _half(side: Sequence[Any], rhs: Matrices) -> Half:
    basis, small, *numbers = side
    return Half(basis, rhs, small, tuple(numbers))


def _apply(*halves: Half) -> list[Matrices]:
    return [
        tall_product([Term(half.basis, inner)], add=half.rhs, scales=(scale,))
        for half, (inner, scale) in zip(halves, project(halves), strict=True)
    ]
