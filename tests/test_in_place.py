"""eigh_update_ and subspace_update_: the same results, written over the tensors they came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import brandla
import oracles
from builders import SymmetricUpdate, dense, make_columns
from oracles import THRESHOLD


def in_place(update: SymmetricUpdate) -> Callable[..., Any]:
    """Return the in-place form of an update."""
    return getattr(brandla, f"{update.name}_")


@pytest.mark.parametrize("k", [0, 1, 8, 60], ids=lambda k: f"k-{k}")
@pytest.mark.parametrize("batch_shape", [(), (2,)], ids=str)
@pytest.mark.parametrize("is_tracked", [False, True], ids=["plain", "tracked"])
def test_in_place_form_equals_the_other_and_keeps_its_tensors(
    update: SymmetricUpdate, k: int, batch_shape: tuple[int, ...], *, is_tracked: bool, dtype: torch.dtype
) -> None:
    old = update.make(64, 12, dtype=dtype, batch_shape=batch_shape)
    value = brandla.track(old) if is_tracked else old
    columns = make_columns(64, k, dtype=dtype, batch_shape=batch_shape)
    expected = update(value, columns, decay=0.9, weight=0.1)
    pointers = [part.data_ptr() for part in tree_leaves(value)]
    result = in_place(update)(value, columns, decay=0.9, weight=0.1)
    assert result is value
    assert [part.data_ptr() for part in tree_leaves(value)] == pointers
    actual_dense, expected_dense = (dense(item.lowrank if is_tracked else item) for item in (value, expected))
    pairs = zip(actual_dense.reshape(-1, 64, 64), expected_dense.reshape(-1, 64, 64), strict=True)
    assert all(oracles.difference_ratio(actual, wanted, dtype) <= THRESHOLD for actual, wanted in pairs)
    if is_tracked:
        torch.testing.assert_close(value.error_bound, expected.error_bound)


def test_in_place_form_takes_a_tolerance(update: SymmetricUpdate) -> None:
    value, columns = update.make(64, 12), make_columns(64, 8, scale=0.1)
    expected = update(value, columns, rank=brandla.Rank(max=12, tol=0.05))
    in_place(update)(value, columns, tol=0.05)
    assert oracles.difference_ratio(dense(value), dense(expected), torch.float64) <= THRESHOLD


def test_columns_are_not_changed(update: SymmetricUpdate, unchanged: Callable[..., Any]) -> None:
    value, columns = update.make(64, 12), make_columns(64, 8)
    with unchanged(columns):
        in_place(update)(value, columns)


@pytest.mark.parametrize(
    ("columns", "options"),
    [(make_columns(5, 8), {}), (make_columns(64, 8), {"decay": -1}), (make_columns(64, 8).float(), {})],
    ids=["rows", "decay", "dtype"],
)
def test_refused_input_leaves_the_factor_as_it_was(
    update: SymmetricUpdate, columns: torch.Tensor, options: dict[str, Any], unchanged: Callable[..., Any]
) -> None:
    value = update.make(64, 12)
    with unchanged(value, columns), pytest.raises((ValueError, TypeError), match=f"^{update.name}_: "):
        in_place(update)(value, columns, **options)


@pytest.mark.parametrize("n", [64, 14], ids=["usual", "k above n - r"])
@pytest.mark.parametrize("spoilt", ["values", "basis", "error_bound"])
def test_expanded_tensors_are_refused_before_anything_is_overwritten(
    update: SymmetricUpdate, spoilt: str, n: int, unchanged: Callable[..., Any]
) -> None:
    old, columns = update.make(n, 12, batch_shape=(2,)), make_columns(n, 8, batch_shape=(2,))
    parts = {"values": old[0], "basis": old[1], "error_bound": brandla.track(old).error_bound}
    parts[spoilt] = parts[spoilt][:1].expand_as(parts[spoilt])
    value = brandla.Tracked(update.factor(parts["values"], parts["basis"]), parts["error_bound"])
    with unchanged(value), pytest.raises(ValueError, match=rf"^{update.name}_: .*share memory; got .*strides \(0, ?"):
        in_place(update)(value, columns)


@pytest.mark.parametrize("n", [64, 14], ids=["usual", "k above n - r"])
@pytest.mark.parametrize("spoilt", ["values", "basis", "error_bound", "columns", "decay", "weight"])
def test_gradients_are_refused_before_anything_is_overwritten(
    update: SymmetricUpdate, spoilt: str, n: int, unchanged: Callable[..., Any]
) -> None:
    value, columns = brandla.track(update.make(n, 12)), make_columns(n, 8)
    decay, weight = torch.tensor(0.9), torch.tensor(0.1)
    parts = {"values": value.lowrank[0], "basis": value.lowrank[1], "error_bound": value.error_bound}
    (parts | {"columns": columns, "decay": decay, "weight": weight})[spoilt].requires_grad_()
    with unchanged(value), pytest.raises(RuntimeError, match=f"^{update.name}_: .* must not require grad"):
        in_place(update)(value, columns, decay=decay, weight=weight)
    assert all(part.grad_fn is None for part in parts.values())
    with torch.no_grad():
        in_place(update)(value, columns, decay=decay, weight=weight)


@pytest.mark.parametrize("tol", [1.0, -0.1, math.nan])
@pytest.mark.parametrize("rank", [0, 12])
def test_tolerances_without_sense_are_refused(
    update: SymmetricUpdate, tol: float, rank: int, unchanged: Callable[..., Any]
) -> None:
    value = update.make(64, rank)
    with unchanged(value), pytest.raises(ValueError, match=rf"^{update.name}_: tol must be in .*got {tol}"):
        in_place(update)(value, make_columns(64, 8), tol=tol)


@pytest.mark.parametrize("k", [0, 8])
def test_a_tolerance_at_rank_zero_changes_nothing(update: SymmetricUpdate, k: int) -> None:
    value = update.make(64, 0)
    assert in_place(update)(value, make_columns(64, k), tol=0.1) is value
    assert not dense(value).any()


def test_non_finite_data_makes_all_nan_without_columns(update: SymmetricUpdate) -> None:
    value = update.make(64, 12, batch_shape=(2,))
    value[1][1, 5, 2] = math.nan
    kept = tree_map(lambda part: part[0].clone(), value)
    in_place(update)(value, make_columns(64, 0, batch_shape=(2,)))
    assert all(part[1].isnan().all() for part in value)
    assert all(torch.equal(part[0], old) for part, old in zip(value, kept, strict=True))


def test_non_finite_data_makes_all_values_nan(update: SymmetricUpdate) -> None:
    value, columns = update.make(64, 12), make_columns(64, 8)
    columns[3, 2] = math.nan
    in_place(update)(value, columns)
    assert value[0].isnan().all()
    assert not value.is_finite()


def test_a_long_stream_in_place_equals_the_other(update: SymmetricUpdate, dtype: torch.dtype) -> None:
    value = update.factor.zeros(64, 12, dtype=dtype)
    copy = tree_map(torch.clone, value)
    matrix = torch.zeros(64, 64, dtype=torch.float64)
    for columns in oracles.batches("medium", 64, 8, 40, dtype=dtype):
        in_place(update)(value, columns, decay=0.9)
        copy = update(copy, columns, decay=0.9)
        matrix = oracles.updated(matrix, columns, 0.9)
    slack = oracles.tolerance(64, dtype, matrix.trace())
    assert abs(dense(value).trace() - dense(copy).trace()) <= slack
