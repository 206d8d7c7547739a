"""``kron_damped_apply`` by two inner and four tall products.

W is read three times: for U_LᵀW, for W U_R, and for the sum. One pass for both projections would have to write a part
of U_LᵀW for every block of BLOCK_N rows of W and read it again, 2·r_L/BLOCK_N times the size of W: more than the pass
it saves from r_L = BLOCK_N/2 on, and at the ranks this is for the products take longer than either.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from brandla_kernels._kernels.inner_product import inner_product
from brandla_kernels._kernels.tall_product import Term, tall_product
from brandla_kernels._signature import Matrices

# U (q, r), Z (r) or (r, r), β: one side's operator β (I + U Z Uᵀ).
Side: TypeAlias = tuple[Matrices, Tensor, Tensor]


def kron_damped_apply(left: Side, right: Side, matrix: Matrices) -> Matrices:
    """Return the left operator times W times the right operator."""
    left_basis, left_middle, left_scale = left
    right_basis, right_middle, right_scale = right
    right_rows = transposed(right_basis)
    left_middle = _dense(left_basis, left_middle)
    right_middle = _dense(right_basis, right_middle)
    right_projection = tall_product([Term(matrix, right_basis)], as_wide_as=right_basis)
    both = left_middle @ inner_product(left_basis, right_projection) @ right_middle
    left_projection = left_middle @ inner_product(left_basis, matrix)
    left_inner = tall_product([Term(both, right_rows)], add=left_projection, as_wide_as=left_projection)
    right_inner = tall_product([Term(right_projection, right_middle)], as_wide_as=right_basis)
    terms = [Term(left_basis, left_inner), Term(right_inner, right_rows)]
    return tall_product(terms, add=matrix, scale=left_scale * right_scale)


def transposed(matrices: Matrices) -> Matrices:
    """Return views of the transposes."""
    return matrices.mT if isinstance(matrices, Tensor) else [matrix.mT for matrix in matrices]


def _dense(basis: Matrices, middle: Tensor) -> Tensor:
    """Return Z as a matrix for each problem."""
    problem_ndim = middle.ndim - (1 if isinstance(basis, list) else basis.ndim - 2)
    return torch.diag_embed(middle) if problem_ndim == 1 else middle
