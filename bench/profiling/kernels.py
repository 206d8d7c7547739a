"""The time of each kernel of some calls: by Proton on a GPU, by torch's profiler on a CPU.

Proton is told by each kernel of brandla how many flops and bytes a launch takes (`brandla_kernels._kernels.launch`).
What torch starts by itself has a time only.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.gpu.ceilings import Ceilings, Work
from bench.gpu.device import Device

WARM_UP = 3
# What Proton itself computes on the device to know of a launch.
OWN = "__proton"
FLOPS = {16: "bf16", 32: "float32", 64: "float64"}


@dataclass
class Kernel:
    """One kernel at one size, summed over its launches; per call once divided by the number of calls."""

    name: str
    launches: float = 0.0
    seconds: float = 0.0
    flops: dict[int, float] = field(default_factory=dict)  # by the bits of the numbers
    bytes: float = 0.0

    def per(self, calls: int) -> Kernel:
        """Return what falls to one call."""
        flops = {bits: number / calls for bits, number in self.flops.items()}
        return Kernel(self.name, self.launches / calls, self.seconds / calls, flops, self.bytes / calls)

    def row(self, total: float, ceilings: Ceilings) -> dict[str, Any]:
        """Return a row of the table: rates, and the part of the ceiling that binds."""
        found = {
            "kernel": self.name,
            "launches": self.launches,
            "µs": 1e6 * self.seconds,
            "% of all": 100 * self.seconds / max(total, 1e-12),
        }
        known = bool(self.flops or self.bytes) and self.seconds > 0
        work = Work(**{FLOPS[bits]: number for bits, number in self.flops.items()}, bytes=self.bytes)
        return found | (rates(work, self.seconds, ceilings) if known else rates(None, 1.0, ceilings))


def rates(work: Work | None, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """Return TFLOP/s, GB/s and the part of the ceiling that binds; None of what is not known."""
    if work is None:
        return dict.fromkeys(("TFLOP/s", "GB/s", "of ceiling", "bound by"))
    floor = ceilings.floor(work)
    return {
        "TFLOP/s": (work.float32 + work.bf16 + work.float64) / seconds / 1e12,
        "GB/s": work.bytes / seconds / 1e9 if work.bytes else None,
        "of ceiling": floor.seconds / seconds,
        "bound by": floor.bound_by,
    }


def measure(device: Device, calls: Sequence[Callable[[], Any]], bits: int = 32) -> list[Kernel]:
    """Return the kernels of a call in a precision of so many bits, the longest first, as means over the calls."""
    for call in calls[:WARM_UP]:
        call()
    device.synchronize()
    found = by_torch(calls, bits) if device.tensors.type == "cpu" else by_proton(device, calls)
    return sorted((kernel.per(len(calls)) for kernel in found), key=lambda kernel: -kernel.seconds)


def by_proton(device: Device, calls: Sequence[Callable[[], Any]]) -> list[Kernel]:
    """Profile the calls under Proton."""
    import triton.profiler as proton

    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder) / "profile"
        session = proton.start(str(name), hook="triton")
        try:
            for call in calls:
                call()
            device.synchronize()
        finally:
            proton.finalize(session)
        return of_tree(json.loads(name.with_suffix(".hatchet").read_text(encoding="utf-8")))


def of_tree(tree: list[dict[str, Any]]) -> list[Kernel]:
    """Sum up what Proton has written: a forest of frames, and the devices behind it."""
    kernels: dict[str, Kernel] = {}
    for root in tree:
        if "frame" in root:
            for name, metrics in _frames(root, None):
                _add(kernels.setdefault(name, Kernel(name)), metrics)
    return [kernel for kernel in kernels.values() if kernel.launches]


def _frames(node: dict[str, Any], launch: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and metrics of every frame; below a launch that says what it does, they are the launch's."""
    name, metrics = node["frame"]["name"], node["metrics"]
    if name.startswith(OWN):
        return
    if "bytes" in metrics:
        launch = name
    yield launch or name, metrics
    for child in node["children"]:
        yield from _frames(child, launch)


def _add(kernel: Kernel, metrics: dict[str, Any]) -> None:
    kernel.launches += metrics.get("count", 0)
    kernel.seconds += metrics.get("time (ns)", 0) / 1e9
    kernel.bytes += metrics.get("bytes", 0)
    for bits in FLOPS:
        if metrics.get(f"flops{bits}"):
            kernel.flops[bits] = kernel.flops.get(bits, 0) + metrics[f"flops{bits}"]


def by_torch(calls: Sequence[Callable[[], Any]], bits: int) -> list[Kernel]:
    """Profile the calls on a CPU: torch's own calls by the time that is theirs alone, with the flops it knows of.

    Torch does not say in which precision these are: in that of numbers of so many bits.
    """
    # With acc_events torch keeps events over several starts; without, it warns of that, though there is but one.
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True, acc_events=True) as profiler:
        for call in calls:
            call()
    return [
        Kernel(
            event.key,
            event.count,
            event.self_cpu_time_total / 1e6,
            {bits: event.flops} if event.flops else {},
        )
        for event in profiler.key_averages()
        if event.self_cpu_time_total > 0
    ]
