"""Times that the kernels would take at the published ceilings of GPUs: estimated, not measured.

A launch takes as long as its bytes at the memory's bandwidth, or as its products at the rate of their type, whichever
is more, and `LAUNCH` on top. Where it has fewer programs than the GPU has multiprocessors, the others add no flops.
What follows one after another inside a program is not counted, nor are torch's own products between the kernels.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from bench.frame.figures import spelled
from bench.gpu import cases
from bench.gpu.device import Stub
from brandla_kernels._kernels.ahead import target_named
from brandla_kernels._kernels.launch import Launch

# Seconds between the starts of two kernels, an assumption: 2 in a graph, up to 8 from the host.
LAUNCH = 4e-6
CAPTION = (
    "Estimated, not measured: µs at the published ceilings (docs/references.md), without sparsity, and"
    f" {LAUNCH * 1e6:.0f} µs a launch, beside what takes longest. Float32 products count as three in TF32 on NVIDIA, as"
    " float32 matrix products on AMD. Bytes and flops are those on the first GPU."
)


class Gpu(NamedTuple):
    """What a vendor publishes of a GPU, and the target that its kernels are compiled for."""

    target: str
    bytes: float  # a second
    flops: Mapping[int, float]  # a second, of matrix products with the accuracy of numbers of so many bits
    multiprocessors: int


GPUS = {
    "H200": Gpu("sm_90", 4.8e12, {16: 989.4e12, 32: 494.7e12 / 3, 64: 66.9e12}, 132),
    "RTX 4090": Gpu("sm_89", 1.008e12, {16: 165.2e12, 32: 82.6e12 / 3, 64: 1.29e12}, 128),
    "MI300X": Gpu("gfx942", 5.3e12, {16: 1307.4e12, 32: 163.4e12, 64: 163.4e12}, 304),
}


class _Published(Stub):
    """A GPU that launches are recorded for, on operands that nothing reads."""

    def __init__(self, gpu: Gpu) -> None:
        self.target = lambda: target_named(gpu.target)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)


def seconds(launch: Launch, gpu: Gpu) -> dict[str, float]:
    """Return the parts of the estimate: the time is that of the launch and the longer of the two others."""
    busy = min(1.0, math.prod(launch.grid) / gpu.multiprocessors)
    products = sum(flops / gpu.flops[bits] for bits, flops in launch.work.flops.items())
    return {"launch": LAUNCH, "bytes": launch.work.bytes / gpu.bytes, "flops": products / busy}


def estimates(sizes: cases.Sizes) -> pd.DataFrame:
    """Return a row for each kernel of an op at a size; kernels that an op starts again are added up."""
    rows: list[dict[str, Any]] = []
    for case in cases.cases(sizes):
        kernels: dict[str, dict[str, Any]] = {}
        for name, gpu in GPUS.items():
            by_kernel: dict[str, list[Launch]] = {}
            for launch in cases.launches(case, _Published(gpu)):
                by_kernel.setdefault(launch.name, []).append(launch)
            for kernel, launches in by_kernel.items():
                row = kernels.setdefault(kernel, {"op": case.op, "case": case.name, "kernel": kernel} | _work(launches))
                row[f"{name}, µs"] = _time([seconds(launch, gpu) for launch in launches])
        rows += kernels.values()
    return pd.DataFrame(rows)


def _work(launches: list[Launch]) -> dict[str, Any]:
    moved, flops = sum(launch.work.bytes for launch in launches), Counter[int]()
    for launch in launches:
        flops.update(launch.work.flops)
    products = ", ".join(f"{spelled(total / 1e9)} of {bits} bits" for bits, total in flops.items())
    return {"launches": len(launches), "MB": spelled(moved / 1e6), "Gflop": products or "–"}


def _time(launches: list[dict[str, float]]) -> str:
    total = sum(parts["launch"] + max(parts["bytes"], parts["flops"]) for parts in launches)
    longest = max(launches[0], key=lambda part: sum(parts[part] for parts in launches))
    return f"{spelled(1e6 * total)} {longest}"
