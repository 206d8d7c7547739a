"""How many threads suit a call of NumPy or SciPy: one, or as many as torch has, whichever is quicker.

Each of the two brings a BLAS whose threads wait for work by spinning. A call that uses both then has more threads
running than there are cores, and may take many times as long as on one thread. torch's own BLAS is part of torch, and
keeps its threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from threadpoolctl import threadpool_limits

# Calls that decide at most, and seconds after which no more are made.
MOST, SECONDS = 7, 0.25
# Seconds after a call in which the threads of a BLAS stop to spin.
REST = 0.1


@contextmanager
def at_best(call: Callable[[], Any]) -> Iterator[int]:
    """Give NumPy and SciPy the number of threads at which the median call is quicker, and say which that is.

    The call was made before, and so is warm.
    """
    # One thread first: it leaves none behind that spin.
    found = {count: _typical(call, count) for count in sorted({1, torch.get_num_threads()})}
    best = min(found, key=lambda count: found[count])
    if best < max(found):
        time.sleep(REST)
    with threadpool_limits(best, "blas"):
        yield best


def in_threads(count: int) -> str:
    """Return a number of threads in words."""
    return f"{count} BLAS thread{'s' if count > 1 else ''}"


def _typical(call: Callable[[], Any], threads: int) -> float:
    """Return the median seconds of a few calls in a row."""
    seconds: list[float] = []
    with threadpool_limits(threads, "blas"):
        while len(seconds) < MOST and sum(seconds) < SECONDS:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return median(seconds)
