"""Peak memory of a call, exactly: the running sum of what torch's allocator gave and took back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes_on(device: torch.device, function: Callable[[], Any], *, warm_up: bool = True) -> int:
    """Return `peak_extra_bytes` of a call whose tensors are on ``device``."""
    if device.type != "cuda":
        return peak_extra_bytes(function, warm_up=warm_up)
    if warm_up:
        function()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_extra_bytes(function: Callable[[], Any], *, warm_up: bool = True) -> int:
    """Return how far the memory in use rises above where it stood before the call, the result included.

    Buffers that the BLAS holds for itself are not seen. What is kept from a first call on does not count: where there
    has been one, ``warm_up`` may be left out.
    """
    if warm_up:
        function()
    # With acc_events torch keeps events over several starts; without, it warns of that, though there is but one.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = function()
    del result
    in_use = peak = 0
    for change in _changes(profiler):
        in_use += change
        peak = max(peak, in_use)
    return peak


def _changes(profiler: profile) -> list[int]:
    """Return the bytes of every allocation (> 0) and every release (< 0), in order."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]
