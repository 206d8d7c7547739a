"""Structured matrices by their definition, entry by entry: what the structures are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from brandla.kfac.systems.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    Member,
    Structure,
    Toeplitz,
    Triangular,
)
from oracles import gaussian, tolerance


def pattern(structure: Structure, n: int) -> Tensor:
    """Return the number of the parameter in each place of an n × n matrix, −1 where there is a zero."""
    i, j = torch.arange(n)[:, None].expand(n, n), torch.arange(n).expand(n, n)
    own = i * n + j
    match structure:
        case Triangular():
            inside = i >= j
        case Dense():
            inside = torch.ones(n, n, dtype=torch.bool)
        case Diagonal():
            inside = i == j
        case BlockDiagonal(block=b):
            inside = i // b == j // b
        case Hierarchical(first=first, last=last):
            head, tail = i < first, (i >= max(first, n - last))
            inside = head | (tail & (j >= first)) | (i == j)
        case Toeplitz():
            inside, own = j >= i, j - i
    return torch.where(inside, own, -1)


def basis(structure: Structure, n: int) -> Tensor:
    """Return the matrices (count, n, n) of 0 and 1 whose sums make up the structure, in float64."""
    numbers = pattern(structure, n)
    return torch.stack([(numbers == number).double() for number in numbers.unique() if number >= 0])


def projected(structure: Structure, matrix: Tensor) -> Tensor:
    """Return the member m, the least of those for which (m + mᵀ)/2 is nearest to a symmetric matrix."""
    n = len(matrix)
    members = basis(structure, n)
    # In a basis of unit length least coefficients are the least matrix.
    lengths = members.flatten(1).norm(dim=1)
    members = members / lengths[:, None, None]
    symmetric = ((members + members.mT) / 2).flatten(1).T
    coefficients = torch.linalg.lstsq(symmetric, matrix.reshape(-1, 1), driver="gelsd").solution[:, 0]
    return torch.einsum("c,cij->ij", coefficients, members)


def random_dense(structure: Structure, n: int, seed: int = 0) -> Tensor:
    """Return a random matrix of the structure, in float64."""
    members = basis(structure, n)
    return torch.einsum("c,cij->ij", gaussian(len(members), seed=seed), members)


def close(actual: Tensor, expected: Tensor, updates: int = 1) -> None:
    """Compare to rounding of as many updates, of sums of n products of each entry by whatever algorithm."""
    bound = updates * tolerance(max(expected.shape), actual.dtype, expected.norm())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


def stored(structure: Structure, matrix: Tensor) -> Member:
    """Return a matrix of the structure as the structure stores it."""
    n = len(matrix)
    match structure:
        case Dense():
            return (matrix.clone(),)
        case Diagonal():
            return (matrix.diagonal().clone(),)
        case BlockDiagonal(block=b):
            b = min(b, n)
            count = -(-n // b)
            filled = matrix.new_zeros(count * b, count * b)
            filled[:n, :n] = matrix
            return (torch.stack([filled[k * b : (k + 1) * b, k * b : (k + 1) * b] for k in range(count)]),)
        case Hierarchical():
            first = min(structure.first, n)
            tail = n - min(structure.last, n - first)
            return matrix[:first].clone(), matrix.diagonal()[first:tail].clone(), matrix[tail:, first:].clone()
        case Toeplitz():
            return (matrix[0].clone(),)
    raise AssertionError
