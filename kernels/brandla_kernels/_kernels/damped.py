"""``damped_apply`` by an inner and a tall product, and ``kron_damped_apply`` by two inner and four tall products.

W is read three times: for U_LᵀW, for W U_R, and for the sum. One pass for both projections would have to write a part
of U_LᵀW for every block of BLOCK_N rows of W and read it again, 2·r_L/BLOCK_N times the size of W: more than the pass
it saves from r_L = BLOCK_N/2 on, and at the ranks this is for the products take longer than either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brandla_kernels._kernels.inner_product import inner_product
from brandla_kernels._kernels.tall_product import Term, tall_product
from brandla_kernels._signature import Matrices


def damped_apply(basis: Matrices, middle: Tensor, scale: Tensor, rhs: Matrices) -> Matrices:
    """Return β (V + U Z UᵀV)."""
    if _is_diagonal(basis, middle):
        inner = inner_product(basis, rhs, row_scale=middle)
    else:
        inner = middle @ inner_product(basis, rhs)
    return tall_product([Term(basis, inner)], add=rhs, scale=scale)


def kron_damped_apply(
    left_basis: Matrices,
    left_middle: Tensor,
    left_scale: Tensor,
    right_basis: Matrices,
    right_middle: Tensor,
    right_scale: Tensor,
    matrix: Matrices,
) -> Matrices:
    """Return the left operator times W times the right operator."""
    right_rows = right_basis.mT if isinstance(right_basis, Tensor) else [basis.mT for basis in right_basis]
    left_middle = torch.diag_embed(left_middle) if _is_diagonal(left_basis, left_middle) else left_middle
    right_middle = torch.diag_embed(right_middle) if _is_diagonal(right_basis, right_middle) else right_middle
    right_projection = tall_product([Term(matrix, right_basis)], as_wide_as=right_basis)
    both = left_middle @ inner_product(left_basis, right_projection) @ right_middle
    left_projection = left_middle @ inner_product(left_basis, matrix)
    left_inner = tall_product([Term(both, right_rows)], add=left_projection, as_wide_as=left_projection)
    right_inner = tall_product([Term(right_projection, right_middle)], as_wide_as=right_basis)
    terms = [Term(left_basis, left_inner), Term(right_inner, right_rows)]
    return tall_product(terms, add=matrix, scale=left_scale * right_scale)


def _is_diagonal(basis: Matrices, middle: Tensor) -> bool:
    """Say whether Z is given as one number a column of U."""
    return middle.ndim == (2 if isinstance(basis, list) else basis.ndim - 1)
