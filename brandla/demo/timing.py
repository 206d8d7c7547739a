"""Wall-clock times that count the device's work."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(function: Callable[[], Result], device: str) -> tuple[Result, float]:
    """Call ``function`` and return its result with the milliseconds it took, the device idle before and after."""
    synchronize(device)
    start = perf_counter()
    result = function()
    synchronize(device)
    return result, 1e3 * (perf_counter() - start)


def synchronize(device: str) -> None:
    """Wait for the device; a CPU has nothing to wait for."""
    torch.get_device_module(device).synchronize()
