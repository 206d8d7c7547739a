"""Tall matrices sharded on their rows: every function equals itself on the whole matrices, and no tall one travels."""

import pytest
import torch

from distributed import sharded
from distributed.processes import run

# Precision decides which passes an update takes, and the number of processes how the rows are laid out: nothing depends
# on the two together.
with_world_size_and_dtype = pytest.mark.parametrize(
    ("world_size", "dtype"), [(2, torch.float32), (4, torch.float64)], ids=["2-float32", "4-float64"]
)


def assert_ranks_agree(results):
    """Check that the small parts, which decide branches, have the same bits on every rank."""
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@with_world_size_and_dtype
@pytest.mark.parametrize("name", sharded.UPDATES)
def test_streams_of_updates_equal_those_of_the_whole(name, dtype, world_size):
    assert_ranks_agree(run(sharded.small_parts, world_size, sharded.update_streams, name, dtype))


@with_world_size_and_dtype
@pytest.mark.parametrize(
    "check",
    [
        sharded.every_call,
        sharded.lists_and_poison,
        sharded.grouped_updates,
        sharded.svd_streams,
        sharded.kron_applications,
    ],
    ids=lambda check: check.__name__,
)
def test_function_equals_itself_on_the_whole(check, dtype, world_size):
    assert_ranks_agree(run(sharded.small_parts, world_size, check, dtype))


@pytest.mark.parametrize("world_size", [2, 4])
def test_gradients_equal_those_of_the_whole(world_size):
    assert_ranks_agree(run(sharded.small_parts, world_size, sharded.gradients))


def test_zeros_and_values_of_a_sharded_factor():
    run(sharded.zeros, 2)


def test_only_small_all_reduces_travel(dtype):
    run(sharded.messages, 2, 1600, 12, 8, dtype)


def test_what_does_not_fit_is_refused_on_every_rank():
    run(sharded.refusals, 2)
