"""What the updates hold and lose on whole streams, beside the exact truncated update in float64."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import brandla
import oracles
from builders import EIGH_UPDATE, ROOT_UPDATE, SymmetricUpdate, defect, dense, make_columns, values_of
from oracles import ORTHONORMAL

N, R, K, STEPS, DECAY = 128, 24, 16, 60, 0.95
# Values of a flat stream, and of one whose subspace is replaced, come so near to one another at the rank that rounding
# chooses what goes: only how much goes can be compared.
WITH_A_GAP = [stream for stream in oracles.STREAMS if stream not in ("flat", "switch")]


class Run(NamedTuple):
    """A stream, the matrix it adds up to, its exact truncated update of rank R, and the largest eigenvalue it had."""

    batches: list[Tensor]
    matrix: Tensor
    truncated: Tensor
    largest: float

    def follow(self, update: SymmetricUpdate, dtype: torch.dtype) -> Any:
        """Return what an update makes of the stream."""
        value = update.factor.zeros(N, R, dtype=dtype)
        for columns in self.batches:
            value = update(value, columns.to(dtype), decay=DECAY, weight=1 - DECAY)
        return value


@cache
def run(stream: str) -> Run:
    """Return the float64 reference of a stream of float32 batches."""
    batches = oracles.batches(stream, N, K, STEPS, dtype=torch.float32)
    matrix = truncated = torch.zeros(N, N, dtype=torch.float64)
    largest = 0.0
    for columns in batches:
        matrix = oracles.updated(matrix, columns, DECAY, 1 - DECAY)
        truncated = oracles.truncated_update(truncated, columns, R, DECAY, 1 - DECAY)
        largest = max(largest, oracles.spectral_norm(matrix))
    return Run(batches, matrix, truncated, largest)


@pytest.mark.parametrize("stream", oracles.STREAMS)
def test_update_discards_no_more_than_the_exact_one(update: SymmetricUpdate, stream: str, dtype: torch.dtype) -> None:
    reference = run(stream)
    lost, best = (
        float((reference.matrix - held).trace())
        for held in (dense(reference.follow(update, dtype)), reference.truncated)
    )
    # Each of R values counts for no more than what stands for 0 in the form: 8 ε·d₁, or the shift of a Cholesky factor.
    unresolved = R * (8 if update.is_exact else 32) * oracles.epsilon(dtype) * reference.largest
    assert lost <= (1.001 if update.is_exact else 1.10) * best + unresolved


@pytest.mark.parametrize("stream", WITH_A_GAP)
def test_root_and_eigenvectors_hold_the_same_matrix(stream: str, dtype: torch.dtype) -> None:
    reference = run(stream)
    root, eigh = (reference.follow(update, dtype) for update in (ROOT_UPDATE, EIGH_UPDATE))
    # Each form adds a few ε·d₁ at every update, which decay as the matrix does.
    rounding = oracles.rounding(N, dtype, reference.largest, DECAY)
    assert oracles.spectral_norm(dense(root) - dense(eigh)) <= 2 * rounding
    for value in (root, eigh):
        assert oracles.spectral_norm(dense(value) - reference.truncated) <= rounding
    assert (values_of(root).diff() <= 0).all()
    assert torch.equal(root.gram, torch.diag(values_of(root)))
    reference_values = oracles.eigh(reference.truncated).eigenvalues[:R]
    assert (values_of(root) - reference_values).abs().max() <= rounding


def test_without_the_polish_orthogonality_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, limit = run("graded"), ORTHONORMAL * torch.finfo(torch.float32).eps
    # The eigendecomposition is in float32, as on a GPU.
    monkeypatch.setattr("brandla._small._SMALL", 0)
    monkeypatch.setattr("brandla._small._FLOAT64_COSTS", math.inf)
    assert defect(reference.follow(EIGH_UPDATE, torch.float32)) <= limit
    monkeypatch.setattr("brandla.brand.polish", lambda panel, values, *_, **__: (panel, values))
    assert not defect(reference.follow(EIGH_UPDATE, torch.float32)) <= limit


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("stream", oracles.STREAMS)
def test_frequent_directions_keep_their_guarantee(stream: str, in_place: bool, dtype: torch.dtype) -> None:
    n, r, k, count = 48, 10, 8, 30
    held, matrix = brandla.track(brandla.LowRankRoot.zeros(n, r, dtype=dtype)), torch.zeros(n, n).double()
    largest = 0.0
    for columns in oracles.batches(stream, n, k, count, dtype=dtype):
        update = brandla.root_update_ if in_place else brandla.root_update
        held = update(held, columns, decay=DECAY, shrink=True)
        matrix = oracles.updated(matrix, columns, DECAY)
        largest = max(largest, oracles.spectral_norm(matrix))
    slack, bound = oracles.rounding(n, dtype, largest, DECAY), float(held.error_bound)
    error = oracles.eigh(matrix - dense(held.lowrank)).eigenvalues
    assert -slack <= error[-1]
    assert error[0] <= bound + slack
    # r + 1 directions lose λ at each update, which leaves no more than this for any truncation to rank j.
    values = oracles.eigh(matrix).eigenvalues
    assert bound <= min(float(values[j:].sum()) / (r + 1 - j) for j in range(r + 1)) + n * slack
    assert abs(float(held.trace) - float(matrix.trace())) <= n * slack
    assert defect(held.lowrank) <= ORTHONORMAL * oracles.epsilon(dtype)


def test_nothing_shrinks_where_nothing_is_left_out() -> None:
    root, columns = ROOT_UPDATE.make(30, 6), make_columns(30, 4)
    for options in ({"rank": 10}, {"weight": 0.0}):
        found, expected = (brandla.root_update(root, columns, **options, shrink=shrink) for shrink in (True, False))
        assert oracles.difference_ratio(dense(found), dense(expected), torch.float64) <= oracles.THRESHOLD
