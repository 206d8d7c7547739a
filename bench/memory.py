"""Peak memory of a call, exactly: the running sum of what torch's allocator gave and took back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(function: Callable[[], Any]) -> int:
    """Return how far the memory in use rises above where it stood before the call, the result included.

    Buffers that the BLAS holds for itself are not seen.
    """
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
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
