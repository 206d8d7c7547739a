"""The timer that pytest-benchmark is given: CUDA events where there is a GPU, the wall clock elsewhere."""

from __future__ import annotations

from time import perf_counter

import torch


class EventTimer:
    """Seconds on the device's own clock, between events recorded at each call.

    A call waits for the device, so that the work queued since the one before lies between their events. Times are
    summed up from call to call: an event's float32 milliseconds since a distant start would be too coarse.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last = self._now()

    def __call__(self) -> float:
        now = self._now()
        self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


TIMER = EventTimer() if torch.cuda.is_available() else perf_counter
