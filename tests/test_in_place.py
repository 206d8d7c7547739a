"""eigh_update_ and root_update_: the same results, written over the tensors they came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import brandla
import oracles
from builders import SymmetricUpdate, dense, make_columns, unchanged
from oracles import THRESHOLD


@pytest.mark.parametrize("k", [0, 8, 60], ids=lambda k: f"k-{k}")
@pytest.mark.parametrize(
    ("batch_shape", "is_tracked"), [((), False), ((), True), ((2,), True)], ids=["plain", "tracked", "batch"]
)
def test_in_place_form_equals_the_other_and_keeps_its_tensors(
    update: SymmetricUpdate, k: int, batch_shape: Any, is_tracked: bool, dtype: torch.dtype
) -> None:
    old = update.make(64, 12, dtype=dtype, batch_shape=batch_shape)
    value = brandla.track(old) if is_tracked else old
    columns = make_columns(64, k, dtype=dtype, batch_shape=batch_shape)
    expected = update(value, columns, decay=0.9, weight=0.1)
    pointers = [part.data_ptr() for part in tree_leaves(value)]
    with unchanged(columns):
        result = update.in_place(value, columns, decay=0.9, weight=0.1)
    assert result is value
    assert [part.data_ptr() for part in tree_leaves(value)] == pointers
    actual_dense, expected_dense = (dense(item.lowrank if is_tracked else item) for item in (value, expected))
    pairs = zip(actual_dense.reshape(-1, 64, 64), expected_dense.reshape(-1, 64, 64), strict=True)
    assert all(oracles.difference_ratio(actual, wanted, dtype) <= THRESHOLD for actual, wanted in pairs)
    if is_tracked:
        torch.testing.assert_close(value[1:], expected[1:])


def test_in_place_form_takes_a_tolerance(update: SymmetricUpdate) -> None:
    value, columns = update.make(64, 12), make_columns(64, 8, scale=0.1)
    expected = update(value, columns, rank=brandla.Rank(max=12, tol=0.05))
    update.in_place(value, columns, tol=0.05)
    assert oracles.difference_ratio(dense(value), dense(expected), torch.float64) <= THRESHOLD


@pytest.mark.parametrize("spoilt", range(4), ids=["first part", "second part", "error_bound", "trace"])
def test_expanded_tensors_are_refused_before_anything_is_overwritten(update: SymmetricUpdate, spoilt: int) -> None:
    columns = make_columns(64, 8, batch_shape=(2,))
    parts, tree = tree_flatten(brandla.track(update.make(64, 12, batch_shape=(2,))))
    parts[spoilt] = parts[spoilt][:1].expand_as(parts[spoilt])
    value = tree_unflatten(parts, tree)
    with unchanged(value), pytest.raises(ValueError, match=rf"^{update.name}_: .*share memory; got .*strides \(0, ?"):
        update.in_place(value, columns)


@pytest.mark.parametrize(
    "spoilt", range(7), ids=["first part", "second part", "error_bound", "trace", "columns", "decay", "weight"]
)
def test_gradients_are_refused_before_anything_is_overwritten(update: SymmetricUpdate, spoilt: int) -> None:
    value, columns = brandla.track(update.make(64, 12)), make_columns(64, 8)
    decay, weight = torch.tensor(0.9), torch.tensor(0.1)
    (*tree_leaves(value), columns, decay, weight)[spoilt].requires_grad_()
    with unchanged(value), pytest.raises(RuntimeError, match=f"^{update.name}_: .* must not require grad"):
        update.in_place(value, columns, decay=decay, weight=weight)
    assert all(part.grad_fn is None for part in tree_leaves(value))
    with torch.no_grad():
        update.in_place(value, columns, decay=decay, weight=weight)


@pytest.mark.parametrize("k", [0, 8])
def test_a_tolerance_at_rank_zero_changes_nothing(update: SymmetricUpdate, k: int) -> None:
    value = update.make(64, 0)
    assert update.in_place(value, make_columns(64, k), tol=0.1) is value
    assert not dense(value).any()
