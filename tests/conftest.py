"""Fixtures and settings shared by all tests."""

import os

# The matrices are small, and each worker has a core: more threads would only wait for each other. This is read when
# torch is imported, also by the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

from builders import SYMMETRIC_UPDATES, Update

# One fixed set of examples, so that a failure is the change's and not the day's.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype a factor can have."""
    return request.param


@pytest.fixture(params=SYMMETRIC_UPDATES, ids=str)
def update(request: pytest.FixtureRequest) -> Update:
    """Each update of a symmetric low-rank matrix."""
    return request.param
