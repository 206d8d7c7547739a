"""The oracles are right where a mistake in them would hide one in the library."""

from __future__ import annotations

import pytest
import torch

import oracles


@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
def test_psd_matrix_has_the_prescribed_eigenvalues(spectrum: str) -> None:
    values = oracles.SPECTRA[spectrum](40)
    computed = oracles.eigh(oracles.psd_matrix(values, seed=0)).eigenvalues
    assert (computed - values).abs().max() <= oracles.tolerance(40, torch.float64)


@pytest.mark.parametrize("stream", oracles.STREAMS)
def test_streams_repeat_for_a_seed_and_scale_with_k(stream: str) -> None:
    first, again = (oracles.batches(stream, 32, 8, 30, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    trace_k8 = sum(float(a.square().sum()) for a in first)
    trace_k16 = sum(float(a.square().sum()) for a in oracles.batches(stream, 32, 16, 30, seed=3))
    assert 0.4 < trace_k8 / trace_k16 < 2.5


def test_repeated_stream_has_rank_k_over_8() -> None:
    (columns,) = oracles.batches("repeated-8", 32, 16, 1)
    assert torch.linalg.matrix_rank(columns) == 2


def test_switching_stream_moves_to_an_orthogonal_subspace() -> None:
    before, after = (oracles.batches("switch", 32, 4, 21)[i] for i in (0, 20))
    assert oracles.spectral_norm(before.mT @ after) < 1e-12


def test_orthonormality_accepts_a_zero_column_only_where_the_value_is_zero() -> None:
    vectors = torch.eye(5, 3, dtype=torch.float64)
    vectors[:, 2] = 0
    assert oracles.orthonormality_defect(vectors, torch.tensor([1.0, 1.0, 0.0])) == 0
    assert oracles.orthonormality_defect(vectors, torch.tensor([1.0, 1.0, 1e-9])) == 1


def test_a_ratio_of_nothing_against_nothing_is_zero() -> None:
    zero = torch.zeros(3, 3)
    assert oracles.difference_ratio(zero, zero, torch.float32) == 0
    assert oracles.difference_ratio(torch.eye(3), zero, torch.float32) == float("inf")
