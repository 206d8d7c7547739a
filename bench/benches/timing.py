"""Times taken in turn, so that whatever slows the machine down slows all candidates alike."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter, sleep
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

WARM_UP = 3


class Interval(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def alternating(
    functions: Mapping[str, Callable[[], Any]], repeats: int, rest: float = 0.0, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Call all functions `repeats` times in turn, every other time in reverse order, and return their seconds.

    Before each call there are `rest` seconds of sleep: threads of one BLAS library spin for a while after a call, and
    would take a core from a function that uses another. Each function is first called ``warm_up`` times untimed.
    """
    for _ in range(warm_up):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with _collector_off():
        for repeat in range(repeats):
            for name in list(functions)[:: -1 if repeat % 2 else 1]:
                sleep(rest)
                start = perf_counter()
                functions[name]()
                seconds[name].append(perf_counter() - start)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Return the median of the quotients of times taken in the same turn."""
    return of_median([a / b for a, b in zip(numerator, denominator, strict=True)])


def of_median(samples: Sequence[float]) -> Interval:
    """Return the median with the interval between the order statistics that hold it with 95 %."""
    ordered = sorted(samples)
    count = len(ordered)
    low = max(math.floor(count / 2 - 0.98 * math.sqrt(count)), 0)
    return Interval(median(ordered), ordered[low], ordered[count - 1 - low])


def slope(sizes: Sequence[int], times: Sequence[float]) -> Interval:
    """Return the slope of log time in log size by least squares; its interval is Student's, misfit included."""
    fit = stats.linregress(np.log(sizes), np.log(times))
    half = stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr
    return Interval(float(fit.slope), float(fit.slope - half), float(fit.slope + half))


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
