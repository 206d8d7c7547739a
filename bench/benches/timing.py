"""Times taken in turn, so that whatever slows the machine down slows all candidates alike, and their statistics.

Also the peak memory of a call, and the calls that reach torch's own operators.
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
    """Yield all names ``rounds`` times, in reverse order every other time."""
    for number in range(rounds):
        yield from names[:: -1 if number % 2 else 1]


def alternating(functions: Calls, repeats: int, warm_up: int = WARM_UP, rest: float = 0.0) -> dict[str, list[float]]:
    """Call all functions in turn, ``warm_up`` times untimed, then ``repeats`` times, and return the seconds.

    Each timed call comes after ``rest`` seconds of sleep: threads of one BLAS library spin for a while after a call,
    and would take a core from a function that uses another library.
    """
    for name in turns(list(functions), warm_up):
        functions[name]()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    # A garbage collection would make one call of many an outlier.
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
    """Return the times of `alternating`; pytest-benchmark's record of the case keeps those of the first call."""
    seconds = alternating(calls, rounds, **options)
    record = benchmark._make_stats(iterations=1)
    for second in seconds[next(iter(calls))]:
        record.update(second)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Return the median of the ratios of times taken in the same turn."""
    return median_interval([a / b for a, b in zip(numerator, denominator, strict=True)])


def median_interval(samples: Sequence[float]) -> Interval:
    """Return the median, and the order statistics that enclose it with 95 % confidence."""
    ordered, count = sorted(samples), len(samples)
    low = max(math.floor(count / 2 - 0.98 * math.sqrt(count)), 0)
    return Interval(median(ordered), ordered[low], ordered[-1 - low])


def slope(sizes: Sequence[int], times: Sequence[float]) -> Interval:
    """Return the slope of log time against log size by least squares, with Student's interval, misfit included."""
    fit = stats.linregress(np.log(sizes), np.log(times))
    half = stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr
    return Interval(float(fit.slope), float(fit.slope - half), float(fit.slope + half))


def synchronized_time() -> float:
    """Return the time once the GPU has done all queued work."""
    torch.cuda.synchronize()
    return perf_counter()


TIMER = synchronized_time if torch.cuda.is_available() else perf_counter


# --- Memory and calls


def peak_extra_bytes(function: Callable[[], Any], device_type: str = "cpu", *, warm_up: bool = True) -> int:
    """Return how far a call raises the memory in use, its result included.

    Buffers of the BLAS are not seen. Memory that a first call keeps does not count; ``warm_up`` makes that first call.
    """
    if warm_up:
        function()
    if device_type != "cuda":
        with profile(profile_memory=True, acc_events=True) as profiler:
            function()
        # Each allocation is > 0, each release < 0.
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
    """Call the function once, and count the calls that reach torch's operators."""
    reached = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            reached.append(func)
            return func(*args, **(kwargs or {}))

    with Counting():
        function()
    return len(reached)
