"""A rank that follows the error bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

from brandla import _check
from brandla.kfac.schedule import Schedule, at


@dataclass(frozen=True)
class ErrorBound:
    """Grow or shrink the rank of a factor so that its error bound stays near ``target`` times its largest eigenvalue.

    Every so many steps the bound is read, once for a factor (of a batch of factors the largest): the only time that the
    device is waited for. Above the target the rank grows by half; under a quarter of it, it shrinks by a quarter. The
    bound forgets what was cut off as the factor forgets its data, so it says most where ``every`` is 1/(1 − decay) or
    more. What shrinking cuts off enters the bound like all else.

    Parameters
    ----------
    target
        Bound of ‖M − M̂‖₂ / d₁ to stay under, > 0.
    least, most
        Limits of the rank; it begins at ``least``.
    every
        Steps between readings: a number, or a function of the step.
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
