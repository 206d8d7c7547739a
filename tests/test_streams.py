"""What the updates lose on whole streams, beside the exact truncated update in float64."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import oracles
from builders import SYMMETRIC_UPDATES, SymmetricUpdate, dense

N, R, K, STEPS, DECAY = 128, 24, 16, 60, 0.95


# While an orthogonal subspace of equal size takes over, eigenvalues cross at the rank and two subspace iterations per
# update do not order them all: 9 % more is lost at this size, with a dense QR in place of the library's as well.
LIMITS = {"switch": {"subspace_update": 1.10}}


class Run(NamedTuple):
    """A stream, the factor it adds up to, and what exact updates of rank R discard of its trace."""

    batches: list[Tensor]
    matrix: Tensor
    discarded: float


@cache
def run(stream: str) -> Run:
    """Return the float64 reference of a stream of float32 batches."""
    batches = oracles.batches(stream, N, K, STEPS, dtype=torch.float32)
    matrix = truncated = torch.zeros(N, N, dtype=torch.float64)
    for columns in batches:
        matrix = oracles.updated(matrix, columns, DECAY, 1 - DECAY)
        truncated = oracles.truncated_update(truncated, columns, R, DECAY, 1 - DECAY)
    return Run(batches, matrix, float((matrix - truncated).trace()))


def discarded_trace(update: SymmetricUpdate, reference: Run, **options: int) -> float:
    """Return the part of the trace that an update lost on a stream, in float32."""
    value = update.factor.zeros(N, R, dtype=torch.float32)
    for columns in reference.batches:
        value = update(value, columns, decay=DECAY, weight=1 - DECAY, **options)
    return float((reference.matrix - dense(value)).trace())


def rounding(reference: Run) -> float:
    """Return what float32 may add to a trace."""
    return 20 * torch.finfo(torch.float32).eps * float(reference.matrix.trace())


@pytest.mark.parametrize("stream", oracles.STREAMS)
def test_update_discards_no_more_than_the_exact_one(update: SymmetricUpdate, stream: str) -> None:
    reference = run(stream)
    limit = LIMITS.get(stream, {}).get(update.name, 1.05)
    assert discarded_trace(update, reference) <= limit * reference.discarded + rounding(reference)


def test_one_subspace_iteration_still_follows_a_switch_to_an_orthogonal_subspace() -> None:
    # A start at the old basis cannot see directions orthogonal to it, and loses several times as much here.
    (update,) = (update for update in SYMMETRIC_UPDATES if update.name == "subspace_update")
    reference = run("switch")
    assert discarded_trace(update, reference, iterations=1) <= 1.15 * reference.discarded
