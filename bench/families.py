"""The stream families of the studies: what comes in, and at which sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

import oracles
from oracles import STREAMS, Stream, power_law, spectral_stream, switching_stream

DECAY, WEIGHT = 0.95, 0.05
GROWTH = 1.02
ROUNDING = 8


@dataclass(frozen=True)
class Family:
    """A stream with its sizes: n rows, rank r, k columns a batch."""

    words: str
    stream: Stream
    n: int = 128
    r: int = 24
    k: int = 16
    steps: int = 60

    def batches(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """Return the batches, rounded to `dtype`."""
        return [columns.to(dtype) for columns in islice(self.stream(self.n, self.k, seed), self.steps)]

    @property
    def sizes(self) -> str:
        """The sizes in words."""
        return f"{self.n}, {self.r}, {self.k}"


def growing(n: int, k: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of i^−½ columns, each GROWTH times as large as the one before."""
    for step, columns in enumerate(STREAMS["slow"](n, k, seed)):
        yield columns * GROWTH**step


def dying(n: int, k: int, seed: int) -> Iterator[Tensor]:
    """Yield sixty batches, then zero batches for good."""
    source = STREAMS["slow"](n, k, seed)
    yield from islice(source, 60)
    while True:
        yield torch.zeros(n, k, dtype=torch.float64)


FAMILIES = {
    "slow": Family("i^−½", STREAMS["slow"]),
    "medium": Family("i^−3/2", STREAMS["medium"]),
    "fast": Family("i^−3", STREAMS["fast"]),
    "flat": Family("flat", STREAMS["flat"]),
    "clustered": Family("four clusters", STREAMS["clustered"]),
    "graded": Family("graded, 1 … 10⁻¹²", STREAMS["graded"]),
    "rank-16": Family("rank 16", STREAMS["rank-16"]),
    "rank-16-wide": Family("rank 16, more columns than that", STREAMS["rank-16"], k=32),
    "repeated": Family("every column eight times", spectral_stream(power_law(0.5), copies=8)),
    "switch": Family("switches to an orthogonal subspace", switching_stream(1.0)),
    "switch-20": Family("the same, 20 times smaller", switching_stream(1 / 20)),
    "switch-1000": Family("the same, 1000 times smaller", switching_stream(1 / 1000)),
    "growing": Family("grows by 2 % a step", growing, steps=1000),
    "one-column": Family("one column at a time", STREAMS["slow"], k=1, steps=400),
    "many-columns": Family("many more columns than the rank", STREAMS["slow"], r=8, k=96),
    "zeros-between": Family("zero batches between", STREAMS["zeros-between"]),
    "dies-out": Family("zero batches for good", dying, steps=100),
}


class Truth(NamedTuple):
    """What a stream adds up to, step by step, in float64."""

    matrices: list[Tensor]
    discarded: list[float]
    roundings: list[float]


def reference(family: Family, batches: list[Tensor]) -> Truth:
    """Return M after each step, what exact truncated updates discard of its trace, and what rounding adds up to.

    The last is in units of ε: ROUNDING·‖M‖₂ an update, which decays as everything before it does.
    """
    matrix = truncated = torch.zeros(family.n, family.n, dtype=torch.float64)
    truth, rounding = Truth([], [], []), 0.0
    for columns in batches:
        matrix = oracles.updated(matrix, columns, DECAY, WEIGHT)
        truncated = oracles.truncated_update(truncated, columns, family.r, DECAY, WEIGHT)
        rounding = DECAY * rounding + ROUNDING * oracles.spectral_norm(matrix)
        truth.matrices.append(matrix)
        truth.discarded.append(float((matrix - truncated).trace()))
        truth.roundings.append(rounding)
    return truth


def best_discarded(matrix: Tensor, rank: int) -> float:
    """Return the trace beyond the `rank` largest eigenvalues."""
    return math.fsum(oracles.eigh(matrix).eigenvalues[rank:].clamp(min=0).tolist())
