"""Times that the kernels would take at the published ceilings of GPUs: estimated, not measured.

A launch takes as long as its bytes at the memory's bandwidth, or as its products at the rate of their type, whichever
is more, and `LAUNCH` on top. Where it has fewer programs than the GPU has multiprocessors, the others add no flops.
What follows one after another inside a program is not counted, nor are torch's own products between the kernels.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from bench.frame.figures import spelled
from bench.gpu import cases
from bench.gpu.cases import Sizes
from bench.gpu.device import Stub
from brandla_kernels import OPS
from brandla_kernels._kernels.ahead import target_named
from brandla_kernels._kernels.launch import Launch, recording

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


class _Unwritten(Stub):
    """Operands that nothing reads."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype)


def seconds(launch: Launch, gpu: Gpu) -> dict[str, float]:
    """Return the parts of the estimate: the time is that of the launch and the longer of the two others."""
    busy = min(1.0, math.prod(launch.grid) / gpu.multiprocessors)
    products = sum(flops / gpu.flops[bits] for bits, flops in launch.work.flops.items())
    return {"launch": LAUNCH, "bytes": launch.work.bytes / gpu.bytes, "flops": products / busy}


def estimates(sizes: Sizes) -> pd.DataFrame:
    """Return a row for each kernel of an op at a size; kernels that an op starts again are added up."""
    rows = pd.DataFrame(_launches(sizes))
    keys = ["op", "case", "kernel"]
    own = {name: rows[rows["gpu"] == name].groupby(keys, sort=False) for name in GPUS}
    first = next(iter(own.values()))
    work = first.agg(launches=("bytes", "size"), MB=("bytes", lambda moved: spelled(moved.sum() / 1e6)))
    work["Gflop"] = first["flops"].agg(_by_bits)
    times = [groups["seconds"].agg(_in_words).rename(f"{name}, µs") for name, groups in own.items()]
    return pd.concat([work, *times], axis=1).reset_index()


def _launches(sizes: Sizes) -> Iterator[dict[str, Any]]:
    for case in cases.cases(sizes):
        op, operands = OPS[case.op], cases.operands(case, _Unwritten())
        for name, gpu in GPUS.items():
            with recording(target_named(gpu.target)) as launches:
                if op.launch is not None:
                    op.launch(*operands)
            for launch in launches:
                about = {"op": case.op, "case": case.name, "kernel": launch.name, "gpu": name}
                work = {"bytes": launch.work.bytes, "flops": launch.work.flops}
                yield about | work | {"seconds": seconds(launch, gpu)}


def _by_bits(flops: pd.Series) -> str:
    totals = pd.DataFrame(list(flops)).sum()
    return ", ".join(f"{spelled(total / 1e9)} of {bits} bits" for bits, total in totals.items()) or "–"


def _in_words(launches: pd.Series) -> str:
    total = sum(parts["launch"] + max(parts["bytes"], parts["flops"]) for parts in launches)
    sums = pd.DataFrame(list(launches)).sum()
    return f"{spelled(1e6 * total)} {sums.idxmax()}"
