"""What a call takes besides time: memory at its peak, and calls that reach torch's own operators."""

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def peak_extra_bytes(function: Callable[[], Any], device_type: str = "cpu", *, warm_up: bool = True) -> int:
    """Return how far the memory in use rises above where it stood before the call, the result included.

    Buffers that the BLAS holds for itself are not seen. What is kept from a first call on does not count: where there
    has been one, ``warm_up`` may be left out.
    """
    if warm_up:
        function()
    if device_type != "cuda":
        return max(accumulate(_changes(function), initial=0))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _changes(function: Callable[[], Any]) -> list[int]:
    """Return the bytes of every allocation (> 0) and every release (< 0) of a call on the CPU, in order."""
    # With acc_events torch keeps events over several starts; without, it warns of that, though there is but one.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


class _Count(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def torch_calls(function: Callable[[], object]) -> int:
    """Call once, and return how many calls reach torch's operators."""
    with _Count() as mode:
        function()
    return mode.count
