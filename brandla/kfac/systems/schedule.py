"""Options that may change during training: schedules, and ranks that follow the error bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TypeAlias, TypeVar

from brandla import _check

Option = TypeVar("Option")
# A value, or a function of the step's number, from 0.
Schedule: TypeAlias = Option | Callable[[int], Option]


def at(schedule: Schedule[Option], step: int) -> Option:
    """Return the value of a schedule at a step."""
    return schedule(step) if callable(schedule) else schedule


def spelled(option: object) -> str:
    """Spell an option like ``repr``, but a function by its qualified name, which is the same in every process."""
    if hasattr(option, "__qualname__"):
        return f"{option.__module__}.{option.__qualname__}"
    if is_dataclass(option) and not isinstance(option, type):
        options = ", ".join(f"{part.name}={spelled(getattr(option, part.name))}" for part in fields(option))
        return f"{type(option).__name__}({options})"
    return repr(option)


@dataclass(frozen=True)
class ErrorBound:
    """Grow or shrink the rank of a factor so that its error bound stays near ``target`` times its largest eigenvalue.

    Every ``every`` steps the bound is read, once for each factor (for a batch of factors, the largest). Only this waits
    for the device. Above the target the rank grows by half. Below a quarter of the target it shrinks by a quarter. The
    bound forgets truncated parts as the factor forgets its data, so it tells most about the rank if ``every`` is
    1/(1 − decay) or more. The bound includes the parts that shrinking truncates.

    Parameters
    ----------
    target
        Upper limit for the bound of ‖M − M̂‖₂ / d₁, > 0.
    least, most
        Limits of the rank, which begins at ``least``.
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
        """Return the rank after ``rank`` for the relative error bound ``error``; NaN leaves the rank unchanged."""
        if error > self.target:
            return min(math.ceil(1.5 * rank), self.most)
        if error < self.target / 4:
            return max(math.floor(0.75 * rank), self.least)
        return rank
