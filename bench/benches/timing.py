"""Times taken in turn, so that whatever slows the machine down slows all candidates alike, and what is said of them.

Beside times, what else a call takes: memory at its peak, and calls that reach torch's own operators.
"""

import gc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from time import perf_counter, sleep
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

WARM_UP = 3
Calls = Mapping[str, Callable[[], Any]]


class Interval(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Yield all names ``rounds`` times, every other time in reverse order."""
    for number in range(rounds):
        yield from names[:: -1 if number % 2 else 1]


def alternating(functions: Calls, repeats: int, warm_up: int = WARM_UP, rest: float = 0.0) -> dict[str, list[float]]:
    """Call all functions ``repeats`` times in turn, and return their seconds; first ``warm_up`` times untimed.

    Before each timed call there are ``rest`` seconds of sleep: threads of one BLAS library spin for a while after a
    call, and would take a core from a function that uses another.
    """
    for name in turns(list(functions), warm_up):
        functions[name]()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    # A collection in one call of many would be its outlier.
    gc.disable()
    try:
        for name in turns(list(functions), repeats):
            sleep(rest)
            start = perf_counter()
            functions[name]()
            seconds[name].append(perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def in_turn(benchmark: Any, calls: Calls, rounds: int, **options: Any) -> dict[str, list[float]]:
    """Return `alternating`; pytest-benchmark's record of the case keeps the times of the first call."""
    seconds = alternating(calls, rounds, **options)
    record = benchmark._make_stats(iterations=1)
    for second in seconds[next(iter(calls))]:
        record.update(second)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Return the median of the quotients of times taken in the same turn."""
    return of_median([a / b for a, b in zip(numerator, denominator, strict=True)])


def of_median(samples: Sequence[float]) -> Interval:
    """Return the median with the interval between the order statistics that hold it with 95 %."""
    ordered, count = sorted(samples), len(samples)
    low = max(math.floor(count / 2 - 0.98 * math.sqrt(count)), 0)
    return Interval(median(ordered), ordered[low], ordered[-1 - low])


def slope(sizes: Sequence[int], times: Sequence[float]) -> Interval:
    """Return the slope of log time in log size by least squares; its interval is Student's, misfit included."""
    fit = stats.linregress(np.log(sizes), np.log(times))
    half = stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr
    return Interval(float(fit.slope), float(fit.slope - half), float(fit.slope + half))


def once_done() -> float:
    """Return the time at which the GPU has done all that was queued."""
    torch.cuda.synchronize()
    return perf_counter()


TIMER = once_done if torch.cuda.is_available() else perf_counter


# --- Memory and calls


def peak_extra_bytes(function: Callable[[], Any], device_type: str = "cpu", *, warm_up: bool = True) -> int:
    """Return how far the memory in use rises above where it stood before the call, the result included.

    Buffers that the BLAS holds for itself are not seen. What is kept from a first call on does not count: where there
    has been one, ``warm_up`` may be left out.
    """
    if warm_up:
        function()
    if device_type != "cuda":
        with profile(profile_memory=True, acc_events=True) as profiler:
            function()
        # Of every allocation (> 0) and every release (< 0).
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(itertools.accumulate(changes, initial=0))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def torch_calls(function: Callable[[], object]) -> int:
    """Call once, and return how many calls reach torch's operators."""
    reached = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reached.append(func)
            return func(*args, **(kwargs or {}))

    with Counting():
        function()
    return len(reached)
