"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# The matrices are small, and each worker has a core: more threads would only wait for each other. This is read when
# torch is imported, also by the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from builders import SYMMETRIC_UPDATES, SymmetricUpdate

# One fixed set of examples, so that a failure is the change's and not the day's.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype a factor can have."""
    return request.param


@pytest.fixture(params=SYMMETRIC_UPDATES, ids=str)
def update(request: pytest.FixtureRequest) -> SymmetricUpdate:
    """Each update of a symmetric low-rank matrix."""
    return request.param


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _unchanged(*arguments: Any) -> Iterator[None]:
    tensors = tensors_in(arguments)
    before = [(tensor.clone(), tensor._version, tensor.stride()) for tensor in tensors]
    yield
    for tensor, (values, version, stride) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert tensor.stride() == stride
        assert torch.equal(tensor.nan_to_num(), values.nan_to_num())
        assert torch.equal(tensor.isnan(), values.isnan())


@pytest.fixture
def unchanged() -> Callable[..., Any]:
    """Return a context manager that checks that no tensor among its arguments was written to."""
    return _unchanged


@pytest.fixture
def shares_memory() -> Callable[[Any, Any], bool]:
    """Return a function that says whether any tensor of one tree lies in the memory of one of the other."""

    def check(one: Any, other: Any) -> bool:
        pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(one) if tensor.numel()}
        return any(tensor.untyped_storage().data_ptr() in pointers for tensor in tensors_in(other) if tensor.numel())

    return check
