"""Tall matrices: one (n, r), a batch (..., n, r), or a list of matrices with different n."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from brandla_kernels._signature import Matrices

# `Matrices`, where a result is a tensor or a list as the argument is. No alias can say that, so it is Any.
Tall: TypeAlias = Any


def rows(matrices: Matrices) -> int:
    """Return the number of rows; the largest of a list."""
    return matrices.shape[-2] if isinstance(matrices, Tensor) else max([one.shape[-2] for one in matrices], default=0)


def columns(matrices: Matrices) -> int:
    """Return the number of columns; the largest of a list."""
    return matrices.shape[-1] if isinstance(matrices, Tensor) else max([one.shape[-1] for one in matrices], default=0)


def dtype_of(matrices: Matrices) -> torch.dtype:
    """Return the dtype that all the matrices have."""
    return matrices.dtype if isinstance(matrices, Tensor) else matrices[0].dtype


def device_of(matrices: Matrices) -> torch.device:
    """Return the device that all the matrices are on."""
    return matrices.device if isinstance(matrices, Tensor) else matrices[0].device


def each(function: Callable[..., Tensor], matrices: Tall, *others: Tall | Tensor) -> Tall:
    """Apply ``function`` to a matrix, or to each matrix of a list and its entries in ``others``."""
    if isinstance(matrices, Tensor):
        return function(matrices, *others)
    return [function(*members) for members in zip(matrices, *others, strict=True)]


def stacked(small: Tall) -> Tensor:
    """Return a small matrix as it is, or stack a list of them."""
    return small if isinstance(small, Tensor) else torch.stack(small)


def subtract_product(columns: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``columns - basis @ coefficients`` in as few passes as torch offers."""
    if columns.ndim == 2:
        return torch.addmm(columns, basis, coefficients, alpha=-1)
    return columns - basis @ coefficients


def columns_at(matrix: Tensor, index: Tensor) -> Tensor:
    """Return the columns of a matrix (..., m, n) at the indices (..., p)."""
    if matrix.ndim == 2:
        # Many times faster than the general form.
        return matrix.index_select(-1, index)
    return matrix.take_along_dim(index[..., None, :], dim=-1)
