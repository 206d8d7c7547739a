"""Ceilings: what the device does at best in this run, by a large copy and by large products in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bench.benches import timing
from bench.gpu.device import Device
from bench.gpu.sizes import Sizes

if TYPE_CHECKING:
    from bench.gpu.findings import Bench, Deadline, Findings


class Floor(NamedTuple):
    """The least time for a piece of work, and the ceiling that sets it."""

    seconds: float
    bound_by: str


class Work(NamedTuple):
    """Flops in each precision, and bytes."""

    float32: int = 0
    bf16: int = 0
    float64: int = 0
    bytes: int = 0


class Ceilings(NamedTuple):
    """Bytes per second of a copy, read and written, and flops per second of products; samples in seconds."""

    copy: float
    float32: float
    tf32: float
    bf16: float
    float64: float
    samples: dict[str, list[float]]

    @property
    def accurate(self) -> float:
        """Flops per second of products at float32 accuracy: torch's own, or three TF32 products for one."""
        return max(self.float32, self.tf32 / 3)

    def floor(self, work: Work) -> Floor:
        """Return the least time for work, and the ceiling that sets it; products and copies may overlap."""
        products = {
            "float32 products": work.float32 / self.accurate,
            "bf16 products": work.bf16 / self.bf16,
            "float64 products": work.float64 / self.float64,
        }
        moved, computed = work.bytes / self.copy, sum(products.values())
        return Floor(moved, "copy") if moved >= computed else Floor(computed, max(products, key=products.__getitem__))


def measure(device: Device, sizes: Sizes) -> Ceilings:
    """Measure all ceilings, on random data."""
    samples = {"copy": _times(device, sizes, _copy(device.normal(sizes.copy // 4)))}
    for name, dtype, precision in (
        ("float32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
        ("float64", torch.float64, "highest"),
    ):
        left, right = (device.normal(sizes.product, sizes.product, dtype=dtype) for _ in range(2))
        with _precision(precision):
            samples[name] = _times(device, sizes, lambda left=left, right=right: left @ right)
    flops = 2 * sizes.product**3
    rates = {name: flops / median(times) for name, times in samples.items() if name != "copy"}
    return Ceilings(2 * sizes.copy / median(samples["copy"]), **rates, samples=samples)


def _copy(source: Tensor) -> Callable[[], Tensor]:
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Measure the ceilings and record them."""
    ceilings, sizes = bench.ceilings, bench.sizes
    for name, times in ceilings.samples.items():
        rate, unit = getattr(ceilings, name), "TB/s" if name == "copy" else "TFLOP/s"
        low, high = (rate / 1e12 * median(times) / edge for edge in reversed(timing.of_median(times)[1:]))
        found.figure("ceiling", _case(name, sizes), timing.Interval(rate / 1e12, low, high), unit=unit)
    found.notes.append(
        f"products at float32 accuracy are held to {ceilings.accurate / 1e12:.4g} TFLOP/s: the larger of torch's"
        " float32 product and a third of its TF32 product"
    )


def _case(name: str, sizes: Sizes) -> str:
    if name == "copy":
        return f"copy of {sizes.copy / 2**20:.4g} MiB, read + write"
    return f"{name} product of order {sizes.product}"


def _times(device: Device, sizes: Sizes, function: Callable[[], Any]) -> list[float]:
    return device.alternating({"it": function}, 2 * sizes.seconds)["it"]


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
