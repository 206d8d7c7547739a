"""The values: construction, conversion, and what they say about themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import brandla
import oracles
from builders import defect, dense, make_eigh, make_root, make_svd
from oracles import ORTHONORMAL, THRESHOLD

MAKERS = {
    "LowRankEigh": lambda **options: make_eigh(20, 5, **options),
    "LowRankRoot": lambda **options: make_root(20, 5, **options),
    "LowRankSVD": lambda **options: make_svd(20, 14, 5, **options),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)
def test_dense_multiplies_the_parts(make: Any, batch_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = make(dtype=dtype, batch_shape=batch_shape)
    assert value.dense().dtype == dtype
    assert value.dense().shape[:-2] == batch_shape
    differences = (value.dense().double() - dense(value)).reshape(-1, *value.dense().shape[-2:])
    assert max(oracles.spectral_norm(difference) for difference in differences) <= oracles.tolerance(20, dtype)


@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 0)], ids=str)
@pytest.mark.parametrize("rank", [0, 1, 7])
def test_zeros_has_the_shapes_and_stands_for_zero(batch_shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    options = {"batch_shape": batch_shape, "dtype": dtype}
    eigh = brandla.LowRankEigh.zeros(7, rank, **options)
    root = brandla.LowRankRoot.zeros(7, rank, **options)
    svd = brandla.LowRankSVD.zeros(7, 9, rank, **options)
    assert brandla.LowRankEigh.zeros(5, 2).eigenvalues.dtype == torch.get_default_dtype()
    shapes = [tuple(part.shape) for part in (*eigh, *root, *svd)]
    expected = [(rank,), (7, rank), (7, rank), (rank, rank), (7, rank), (rank,), (rank, 9)]
    assert shapes == [(*batch_shape, *shape) for shape in expected]
    assert {part.dtype for part in (*eigh, *root, *svd)} == {dtype}
    assert not any(value.dense().any() for value in (eigh, root, svd))
    assert (eigh.n, eigh.rank, root.n, root.rank, svd.rank) == (7, rank, 7, rank, rank)


@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
@pytest.mark.parametrize("batch_shape", [(), (2,)], ids=str)
def test_a_root_becomes_eigenvectors_and_again_a_root(spectrum: str, batch_shape: Any, dtype: torch.dtype) -> None:
    root = make_root(20, 5, spectrum, dtype=dtype, batch_shape=batch_shape)
    eigh = root.to_eigh()
    back = brandla.LowRankRoot.from_eigh(eigh)
    assert eigh.eigenvectors.dtype == dtype
    assert (eigh.eigenvalues >= 0).all()
    assert (eigh.eigenvalues.diff() <= 0).all()
    assert defect(eigh) <= ORTHONORMAL * oracles.epsilon(dtype)
    assert torch.equal(back.gram, torch.diag_embed(eigh.eigenvalues))
    assert defect(back) <= ORTHONORMAL * oracles.epsilon(dtype)
    for original, diagonal, again in zip(
        *(dense(value).reshape(-1, 20, 20) for value in (root, eigh, back)), strict=True
    ):
        # Values up to 8 ε·d₁ become 0.
        slack = 2 * oracles.rounding(20, dtype, oracles.spectral_norm(original))
        assert oracles.spectral_norm(diagonal - original) <= slack
        assert oracles.spectral_norm(again - original) <= slack


def test_a_root_of_dependent_columns_has_as_many_eigenvectors_as_it_has_rank(dtype: torch.dtype) -> None:
    columns = oracles.gaussian(20, 2, seed=0).to(dtype) @ torch.tensor([[1, 0, 2, 0], [0, 1, 1, 0]], dtype=dtype)
    eigh = brandla.LowRankRoot(columns, columns.mT @ columns).to_eigh()
    assert (eigh.eigenvalues > 0).tolist() == [True, True, False, False]
    assert eigh.eigenvectors.any(-2).tolist() == [True, True, False, False]
    assert defect(eigh) <= ORTHONORMAL * oracles.epsilon(dtype)


def test_a_root_of_more_columns_than_rows_has_as_many_eigenvectors_as_rows(dtype: torch.dtype) -> None:
    columns = oracles.gaussian(4, 7, seed=0).to(dtype)
    root = brandla.LowRankRoot(columns, columns.mT @ columns)
    assert root.to_eigh().eigenvectors.shape == (4, 4)
    assert oracles.difference_ratio(dense(root.to_eigh()), dense(root), dtype) <= THRESHOLD


def test_a_poisoned_root_has_no_finite_eigenvector() -> None:
    root = make_root(20, 5, batch_shape=(2,))
    root.root[1, 3, 2] = math.nan
    eigh = root.to_eigh()
    assert eigh.is_finite().tolist() == [True, False]
    assert eigh.eigenvectors[1].isnan().all()
    assert eigh.eigenvectors[0].isfinite().all()


@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
def test_largest_eigenvalue_is_near_from_below_and_right_of_a_diagonal(spectrum: str, dtype: torch.dtype) -> None:
    eigh, full = make_eigh(20, 5, spectrum, dtype=dtype), make_root(20, 5, spectrum, dtype=dtype)
    diagonal = make_root(20, 5, spectrum, dtype=dtype, diagonal=True)
    largest = float(oracles.SPECTRA[spectrum](5)[0])
    rounding = 8 * oracles.epsilon(dtype) * largest
    assert abs(float(diagonal.largest_eigenvalue()) - float(eigh.largest_eigenvalue())) <= rounding
    # From the best of r unit vectors, which holds 1/r of the leading one in its square at least.
    assert largest / 5**0.5 - rounding <= float(full.largest_eigenvalue()) <= largest + rounding
    for factor in (brandla.LowRankEigh, brandla.LowRankRoot):
        assert factor.zeros(7, 0, batch_shape=(2,)).largest_eigenvalue().tolist() == [0, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_is_finite_tells_which_batch_entry_is_poisoned(make: Any, bad: float) -> None:
    value = make(batch_shape=(2, 2))
    assert value.is_finite().all()
    values = {"LowRankEigh": value[0], "LowRankRoot": value[1], "LowRankSVD": value[1]}[type(value).__name__]
    values[1, 0] = bad
    assert value.is_finite().tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("batch_shape", [(), (3,)], ids=str)
@pytest.mark.parametrize("make_factor", [make_eigh, make_root])
def test_track_starts_at_zero_in_the_dtype_of_the_factor(
    make_factor: Any, batch_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    factor = make_factor(9, 3, dtype=dtype, batch_shape=batch_shape)
    tracked = brandla.track(factor)
    assert tracked.lowrank is factor
    assert (tracked.error_bound.dtype, tracked.error_bound.shape) == (dtype, batch_shape)
    assert not tracked.error_bound.any()
    torch.testing.assert_close(tracked.trace, factor.dense().diagonal(dim1=-2, dim2=-1).sum(-1))


def test_values_pass_through_functorch_and_pytrees(make: Any) -> None:
    value = make()
    doubled = torch.utils._pytree.tree_map(lambda part: 2 * part, value)
    assert type(doubled) is type(value)
    batch = make(batch_shape=(3,))
    mapped = torch.vmap(lambda one: one.dense())(batch)
    torch.testing.assert_close(mapped, batch.dense())
