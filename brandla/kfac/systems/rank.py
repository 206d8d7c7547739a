"""Ranks that change in training: by schedules, by rules, and with the error bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

from brandla import _check
from brandla.kfac.systems.schedule import Schedule, at
from brandla.lowrank import Rank, most_of


@dataclass(frozen=True)
class ErrorBound:
    """Grow or shrink the rank of a factor so that its error bound stays near ``target`` times its largest eigenvalue.

    Every ``every`` steps the bound is read, once for each factor (for a batch of factors, the largest). Only this waits
    for the device. Above the target the rank grows by half; under a quarter of it, it shrinks by a quarter. The bound
    forgets what was cut off as the factor forgets its data, so it says most if ``every`` is 1/(1 − decay) or more. The
    bound includes what shrinking cuts off.

    Parameters
    ----------
    target
        Bound of ‖M − M̂‖₂ / d₁ to stay under, > 0.
    least, most
        Limits of the rank; it begins at ``least``.
    every
        Steps between readings: a number, or a function of the step.

    Examples
    --------
    >>> from brandla.kfac import Brand, ErrorBound
    >>> strategy = Brand(rank=ErrorBound(target=0.01, least=16, most=128))
    """

    target: float
    least: int
    most: int
    every: Schedule[int] = 20

    def __post_init__(self) -> None:
        if not 0 < self.target < float("inf"):
            _check.fail_value("ErrorBound", f"target must be finite and > 0; got {self.target}")
        _check.count("ErrorBound", "least", self.least, 1)
        _check.count("ErrorBound", "most", self.most, self.least)
        _check.count("ErrorBound", "every", at(self.every, 0), 1)

    def next(self, rank: int, error: float) -> int:
        """Return the rank to follow ``rank`` when the relative error bound is ``error``; the same for NaN."""
        if error > self.target:
            return min(math.ceil(1.5 * rank), self.most)
        if error < self.target / 4:
            return max(math.floor(0.75 * rank), self.least)
        return rank


def check_rank(strategy: object, rank: Schedule[int | Rank]) -> None:
    """Check a rank, or the first value of a schedule."""
    first = rank_at(rank, 0)
    if not isinstance(first, Rank):
        _check.count(type(strategy).__name__, "rank", first, 1)


def first_rank(rank: Schedule[int | Rank]) -> int:
    """Return the number of columns that a factor begins with."""
    return cast(int, most_of(rank_at(rank, 0)))


def rank_at(rank: Schedule[int | Rank], step: int) -> int | Rank:
    """Return the rank of a step."""
    return rank(step) if callable(rank) else rank


def fitting(rank: int | Rank, most: int) -> int | Rank:
    """Return the rank, or the largest one that there can be."""
    return replace(rank, max=min(rank.max, most)) if isinstance(rank, Rank) else min(rank, most)
