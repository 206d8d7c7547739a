"""The public functions under torch.compile: one whole graph where no function waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import brandla
from test_sync_free import CALLS, COLUMNS, EIGH

TRACED = [
    "subspace_update",
    "subspace_update, tracked",
    "damped_solve, eigh",
    "damped_solve, sym",
    "damped_power, eigh",
    "kron_damped_solve",
    "kron_damped_solve, pair",
]


def assert_close(actual: Any, expected: Any) -> None:
    """Check that two results are of one kind and equal up to the order of operations."""
    assert type(actual) is type(expected)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TRACED)
def test_function_compiles_to_one_graph(name: str) -> None:
    function, arguments = CALLS[name]
    torch._dynamo.reset()
    # The backend "eager" runs the captured graph as it is: what is tested is the capture.
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_exact_update_compiles_around_its_eigendecomposition() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda eigh, columns: brandla.eigh_update(eigh, columns, decay=0.9), backend="eager")
    actual, expected = compiled(EIGH, COLUMNS), brandla.eigh_update(EIGH, COLUMNS, decay=0.9)
    assert isinstance(actual, brandla.LowRankEigh)
    torch.testing.assert_close(actual.dense(), expected.dense())
