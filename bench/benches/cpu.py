"""The CPU as a device to measure: wall clock, calls in turn, inputs that outlast its cache."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.benches import timing
from bench.gpu.device import MOST, Captured, Device, Gpu, Stub

CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
# The last cache of a processor that does not say.
USUAL_CACHE = 32 * 2**20
# A dense decomposition takes seconds.
FEWEST = 3


class Cpu(Stub):
    """What `Stub` stands in with, measured: a call is recorded by keeping it."""

    dry = False

    def __init__(self) -> None:
        super().__init__()
        self.cache_bytes = _cache_bytes()

    def alternating(self, functions: Mapping[str, Callable[[], Any]], limit: float) -> dict[str, list[float]]:
        start = time.perf_counter()
        for function in functions.values():
            function()
        rounds = limit / (time.perf_counter() - start)
        return timing.alternating(functions, int(min(max(rounds, FEWEST), MOST)), warm_up=0 if rounds < FEWEST else 2)

    def capture(self, function: Callable[[], Any]) -> Captured:
        return Captured(function(), function)


def device_of(quick: bool) -> Device:
    """Return the GPU where torch sees one, the CPU elsewhere; for a short run the CPU that measures nothing."""
    if quick:
        return Stub()
    return Gpu() if torch.cuda.is_available() else Cpu()


def _cache_bytes() -> int:
    found = re.fullmatch(r"(\d+)K\s*", CACHE.read_text(encoding="ascii")) if CACHE.exists() else None
    return 2**10 * int(found.group(1)) if found else USUAL_CACHE
