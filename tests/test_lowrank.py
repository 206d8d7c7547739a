"""The values: construction, conversion, and what they say about themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import brandla
import oracles
from builders import dense, make_eigh, make_svd, make_sym
from oracles import THRESHOLD

MAKERS = {
    "LowRankEigh": lambda **options: make_eigh(20, 5, **options),
    "LowRankSym": lambda **options: make_sym(20, 5, **options),
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
    sym = brandla.LowRankSym.zeros(7, rank, **options)
    svd = brandla.LowRankSVD.zeros(7, 9, rank, **options)
    shapes = [tuple(part.shape) for part in (*eigh, *sym, *svd)]
    expected = [(rank,), (7, rank), (rank, rank), (7, rank), (7, rank), (rank,), (rank, 9)]
    assert shapes == [(*batch_shape, *shape) for shape in expected]
    assert {part.dtype for part in (*eigh, *sym, *svd)} == {dtype}
    assert not any(value.dense().any() for value in (eigh, sym, svd))
    assert (eigh.n, eigh.rank, sym.n, sym.rank, svd.rank) == (7, rank, 7, rank, rank)


def test_zeros_follows_the_default_dtype() -> None:
    assert brandla.LowRankEigh.zeros(5, 2).eigenvalues.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
@pytest.mark.parametrize("batch_shape", [(), (2,)], ids=str)
def test_sym_and_eigh_convert_into_each_other(spectrum: str, batch_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sym = make_sym(20, 5, spectrum, dtype=dtype, batch_shape=batch_shape)
    eigh = sym.eigh()
    back = brandla.LowRankSym.from_eigh(eigh)
    assert (eigh.eigenvalues.diff() <= 0).all()
    assert eigh.eigenvectors.dtype == dtype
    for original, diagonal, again in zip(
        *(dense(value).reshape(-1, 20, 20) for value in (sym, eigh, back)), strict=True
    ):
        assert oracles.difference_ratio(diagonal, original, dtype) <= THRESHOLD
        assert oracles.difference_ratio(again, original, dtype) <= THRESHOLD


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_is_finite_tells_which_batch_entry_is_poisoned(make: Any, bad: float) -> None:
    value = make(batch_shape=(2, 2))
    assert value.is_finite().all()
    values = value.S if isinstance(value, brandla.LowRankSVD) else value[0]
    values[1, 0] = bad
    assert value.is_finite().tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("batch_shape", [(), (3,)], ids=str)
def test_track_starts_at_zero_in_the_dtype_of_the_factor(batch_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for factor in (
        make_eigh(9, 3, dtype=dtype, batch_shape=batch_shape),
        make_sym(9, 3, dtype=dtype, batch_shape=batch_shape),
    ):
        tracked = brandla.track(factor)
        assert tracked.lowrank is factor
        assert tracked.error_bound.dtype == dtype
        assert tracked.error_bound.shape == batch_shape
        assert not tracked.error_bound.any()


def test_values_pass_through_functorch_and_pytrees(make: Any) -> None:
    value = make()
    doubled = torch.utils._pytree.tree_map(lambda part: 2 * part, value)
    assert type(doubled) is type(value)
    batch = make(batch_shape=(3,))
    mapped = torch.vmap(lambda one: one.dense())(batch)
    torch.testing.assert_close(mapped, batch.dense())
