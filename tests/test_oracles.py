"""Checks of the oracles, in places where a mistake in them would hide one in the library."""

import pytest
import torch

import oracles


@pytest.mark.parametrize("stream", oracles.STREAMS)
def test_streams_repeat_for_a_seed_and_scale_with_k(stream):
    first, again, wide = (oracles.batches(stream, 32, k, 30, seed=3) for k in (8, 8, 16))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    trace, of_wide = (sum(float(a.square().sum()) for a in batches) for batches in (first, wide))
    assert 0.4 < trace / of_wide < 2.5


def test_streams_of_a_rank_and_of_two_subspaces_are_what_they_are_called():
    (columns,) = oracles.batches("repeated-8", 32, 16, 1)
    assert torch.linalg.matrix_rank(columns) == 2
    before, *_, after = oracles.batches("switch", 32, 4, 21)
    assert oracles.spectral_norm(before.mT @ after) < 1e-12


def test_a_zero_column_is_right_if_its_value_is_zero_and_a_ratio_of_two_zeros_is_zero():
    vectors, zero = torch.eye(5, 3, dtype=torch.float64), torch.zeros(3, 3)
    vectors[:, 2] = 0
    assert oracles.orthonormality_defect(vectors, torch.tensor([1.0, 1.0, 0.0])) == 0
    assert oracles.orthonormality_defect(vectors, torch.tensor([1.0, 1.0, 1e-9])) == 1
    assert oracles.difference_ratio(zero, zero, torch.float32) == 0
    assert oracles.difference_ratio(torch.eye(3), zero, torch.float32) == float("inf")
