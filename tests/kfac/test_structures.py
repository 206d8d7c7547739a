"""Structures against dense arithmetic on matrices written down entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brandla.kfac.systems.structures import (
    STRUCTURES,
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    Structure,
    Toeplitz,
    Triangular,
)
from kfac.structured import close, projected, random_dense, stored
from oracles import gaussian

DOUBLE, CPU = torch.float64, torch.device("cpu")

structures = st.one_of(
    st.sampled_from([Dense(), Diagonal(), Triangular(), Toeplitz()]),
    st.builds(BlockDiagonal, st.integers(1, 9)),
    st.builds(Hierarchical, st.integers(0, 5), st.integers(0, 5)),
)
sizes = st.sampled_from([1, 2, 3, 7, 12, 13, 17])


@given(structures, sizes)
def test_products_with_rows_are_those_of_the_dense_matrix(structure: Structure, n: int):
    dense, X = random_dense(structure, n), gaussian(4, n, seed=7)
    member = stored(structure, dense)
    close(structure.dense(member, n), dense)
    close(structure.times(X, member), X @ dense)
    close(structure.times_transposed(X, member), X @ dense.T)


@given(structures, sizes)
def test_product_of_two_members_is_a_member(structure: Structure, n: int):
    """The dense product is in the structure, and what is stored of it is what was computed."""
    first, second = random_dense(structure, n, 1), random_dense(structure, n, 2)
    product = structure.product(stored(structure, first), stored(structure, second))
    close(structure.dense(product, n), first @ second)
    for part, expected in zip(product, stored(structure, first @ second), strict=True):
        assert part.shape == expected.shape
        close(part, expected)


@given(structures, sizes)
def test_gram_matrices_are_projections_of_the_dense_ones(structure: Structure, n: int):
    """Of rows, and of a member itself."""
    X, dense = gaussian(5, n, seed=7), random_dense(structure, n)
    close(structure.dense(structure.gram(X), n), projected(structure, X.T @ X))
    close(structure.dense(structure.own_gram(stored(structure, dense)), n), projected(structure, dense.T @ dense))


@given(structures, sizes)
def test_identity_trace_norm_and_sums(structure: Structure, n: int):
    identity = structure.identity(n, (), DOUBLE, CPU)
    dense = random_dense(structure, n)
    member = stored(structure, dense)
    close(structure.dense(identity, n), torch.eye(n, dtype=DOUBLE))
    close(structure.trace(member)[None], dense.trace()[None])
    close(structure.squared_norm(member)[None], dense.square().sum()[None])
    total = structure.combine((2.0, member), (torch.tensor(-1.0, dtype=DOUBLE), identity))
    close(structure.dense(total, n), 2 * dense - torch.eye(n, dtype=DOUBLE))


NUMBERS = {
    Dense(): 1000**2,
    Triangular(): 1000**2,
    Diagonal(): 1000,
    BlockDiagonal(32): 32 * 1024,
    Hierarchical(16, 16): 16 * 1000 + 968 + 16 * 984,
    Toeplitz(): 1000,
}


@pytest.mark.parametrize(("structure", "numbers"), NUMBERS.items(), ids=map(repr, NUMBERS))
def test_storage_is_what_the_structure_promises(structure: Structure, numbers: int):
    assert sum(part.numel() for part in structure.identity(1000, (), torch.float32, CPU)) == numbers


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_flops_of_small_structures_grow_slower_than_dense_ones(structure: Structure):
    growth = structure.flops(8192) / structure.flops(1024)
    # n² grows by 64, n log n by 8 · 13/10 and a bit for the length of the transform.
    assert growth == 64 if isinstance(structure, Dense) else growth < 11
