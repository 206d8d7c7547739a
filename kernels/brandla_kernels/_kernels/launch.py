"""One way to start a kernel: on the device, in Triton's interpreter, or as a record of what would be started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """Tile sizes (the kernel's BLOCK_ constants), warps of a program, and stages of its software pipeline.

    ``registers`` of a thread, where given, takes the place of the limit that NVIDIA's assembler sets itself to fit more
    programs on a multiprocessor, and for which it may spill.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton takes beside the kernel's arguments."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limit


class Target(NamedTuple):
    """What the choice of precision and of tiles depends on: the backend ("cuda", "hip") and its architecture."""

    backend: str
    arch: str


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it would have been started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)


class _Record(NamedTuple):
    target: Target
    launches: list[Launch]


_record: ContextVar[_Record | None] = ContextVar("brandla_launch_record", default=None)

# Products of float32 matrices at float32 accuracy on matrix units. The default of tl.dot would be TF32.
_FLOAT32_PRODUCTS = {"cuda": "tf32x3", "hip": "ieee"}


def start(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
    """Start ``kernel`` on ``grid``; an empty grid starts nothing."""
    if 0 in grid:
        return
    record = _record.get()
    if record is not None:
        record.launches.append(Launch(kernel, grid, dict(arguments), config))
        return
    kernel[grid](**arguments, **config.blocks, **config.options)


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collect the launches of the ``with`` block instead of starting them, as they would be on ``target``.

    Outputs stay unwritten. The tensors may lie on a CPU: only shapes, strides, dtypes and alignment matter.
    """
    record = _Record(target, [])
    token = _record.set(record)
    try:
        yield record.launches
    finally:
        _record.reset(token)


def target_of(tensor: Tensor) -> Target:
    """Name the target that kernels on ``tensor`` run on."""
    record = _record.get()
    if record is not None:
        return record.target
    if tensor.device.type == "cpu":
        return Target("interpreter", "cpu")
    if torch.version.hip:
        return Target("hip", torch.cuda.get_device_properties(tensor.device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return Target("cuda", f"sm_{major}{minor}")


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def product_precision(target: Target, dtype: torch.dtype) -> str:
    """Return ``input_precision`` for products in ``dtype`` that lose none of its accuracy."""
    return _FLOAT32_PRODUCTS.get(target.backend, "ieee") if dtype == torch.float32 else "ieee"


def triton_dtype(dtype: torch.dtype) -> Any:
    """Return the Triton name of a floating-point dtype."""
    names = {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    return names[dtype]
