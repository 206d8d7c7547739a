"""Start kernels on the device or in Triton's interpreter, or record what would be started.

A kernel counts its work (`counted`) only if a profiler listens to launches (Proton with ``hook="triton"``). The
profiler gets the kernel's name with its sizes, flops by the width of the numbers, and bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from brandla_kernels._kernels.matrices import bytes_of, shapes, uploaded
from brandla_kernels._signature import Matrices
from brandla_kernels._targets import WEAK_FLOAT64, architecture, nearest
from brandla_kernels.tall import device_of


class Config(NamedTuple):
    """Tile sizes (the kernel's BLOCK_ constants), warps of a program, and stages of its software pipeline.

    ``registers`` of a thread, if given, replaces the limit that NVIDIA's assembler chooses to fit more programs on a
    multiprocessor, and that may make it spill.
    """

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Triton's options, beside the kernel's arguments."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limit


class Target(NamedTuple):
    """A backend ("cuda", "hip") and a listed architecture: precision and tiles depend on them."""

    backend: str
    arch: str


class Work(NamedTuple):
    """The work of a launch.

    ``flops`` are counted as in `brandla_kernels.Cost`, by the bits of the numbers (16, 32, 64). ``bytes`` counts
    once each matrix or workspace that the launch reads or writes, and twice one that it overwrites. ``sizes`` are the
    kernel's letters, for its name.
    """

    flops: Mapping[int, int]
    bytes: int
    sizes: Mapping[str, int]


Count = Callable[[Mapping[str, Any]], Work]
Kernel = TypeVar("Kernel")


class Launch(NamedTuple):
    """A kernel with its grid, its arguments and its tiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def all_arguments(self) -> dict[str, Any]:
        """All arguments of the kernel in its order, tiles and defaults among them."""
        return {**_defaults(self.kernel.fn), **self.arguments, **self.config.blocks}

    @property
    def work(self) -> Work:
        """The work of the launch, as its kernel counts it."""
        counted: Work = self.kernel.count(self.arguments)
        return counted


_record: ContextVar[tuple[Target, list[Launch]] | None] = ContextVar("brandla_launch_record", default=None)
# Returns the target and the list of recorded launches, or None while launches are started.
active_record = _record.get


def start(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
    """Start ``kernel`` on ``grid``, or record it; an empty grid starts nothing."""
    if 0 in grid:
        return
    launch = Launch(kernel, grid, arguments, config)
    if (record := active_record()) is not None:
        record[1].append(launch)
        return
    # Triton launches on the current device, whatever device its tensors are on.
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
        run_kernel(launch, launch.all_arguments)


@cache
def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def is_profiled() -> bool:
    """Say whether a profiler listens to launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    # The hook may be a chain of hooks, which is never None and has no truth value of its own.
    return hook is not None and bool(getattr(hook, "calls", True))


def run_kernel(launch: Launch, arguments: dict[str, Any], compiled: Any = None) -> Any:
    """Start a kernel with all its arguments. Return what Triton compiled, to save looking it up again.

    ``compiled`` is an earlier return value, for arguments that Triton does not tell from these.
    """
    if (table := arguments.get("table_ptr")) is not None:
        arguments["table_ptr"] = uploaded(table, next(iter(arguments.values())).device)
    kernel, grid = launch.kernel, launch.grid
    if is_profiled():
        # Set here, not in triton.jit: a kernel with metadata pays for a dictionary of its arguments at every launch.
        kernel.launch_metadata = partial(metadata, kernel.count)
    elif compiled is not None:
        compiled[(*grid, 1, 1)](*arguments.values())
        return compiled
    result = kernel[grid](*arguments.values(), **launch.config.options)
    return result if isinstance(result, triton.compiler.CompiledKernel) else None


def counted(
    letters: str,
    flops: Callable[..., int] = lambda given, *matrices: 0,
    times: Callable[[Mapping[str, Any]], Mapping[str, int]] = lambda given: {},
) -> Callable[[Kernel], Kernel]:
    """Attach to a kernel the count of its work, a function of its arguments.

    ``letters`` name the arguments that are sizes. ``flops`` returns the flops of one problem, from the arguments and
    the rows and columns of each matrix. ``times`` says how often a tensor is moved, if not once.
    """

    def count(given: Mapping[str, Any]) -> Work:
        problems = shapes(given) if "table_ptr" in given else []
        number = sum(flops(given, *matrices) for matrices in problems)
        compute = given.get("COMPUTE", tl.float64)
        # Triton may wrap the dtype as a constant.
        bits = int(getattr(compute, "value", compute).primitive_bitwidth)
        sizes = {letter.lower(): given[letter] for letter in letters.split()}
        return Work({bits: number} if number else {}, bytes_of(given, problems, times(given)), sizes)

    def attach(kernel: Kernel) -> Kernel:
        # Triton's kernels take attributes that their type does not name.
        kernel.count = count  # type: ignore[attr-defined]
        return kernel

    return attach


def metadata(count: Count, grid: tuple[int, ...], compiled: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name, flops and bytes of a launch for a profiler, as Triton's ``launch_metadata`` does.

    The sizes of a list are read from the device, but not while a graph is captured.
    """
    table = arguments.get("table_ptr")
    if table is not None and table.is_cuda and torch.cuda.is_current_stream_capturing():
        return {"name": compiled.name}
    work = count(arguments)
    sizes = ", ".join(f"{letter}={size}" for letter, size in work.sizes.items())
    flops = {f"flops{bits}": number for bits, number in work.flops.items()}
    return {"name": f"{compiled.name} [{sizes}]", **flops, "bytes": work.bytes}


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collect the launches of the ``with`` block instead of starting them, as they would be on ``target``.

    Outputs stay unwritten. The tensors may lie on a CPU: only shapes, strides, dtypes and alignment matter.
    """
    launches: list[Launch] = []
    token = _record.set((target, launches))
    try:
        yield launches
    finally:
        _record.reset(token)


def target_of(matrices: Matrices) -> Target:
    """Return the target of kernels on a tensor or on a list of tensors."""
    record = active_record()
    return _target(device_of(matrices)) if record is None else record[0]


@cache
def _target(device: torch.device) -> Target:
    if device.type == "cpu":
        return Target("interpreter", "cpu")
    arch = architecture(device.index)
    return Target("hip" if torch.version.hip else "cuda", nearest(arch) or arch)


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def product_precision(target: Target, dtype: torch.dtype) -> str:
    """Return the ``input_precision`` of tl.dot that keeps the accuracy of ``dtype``.

    On NVIDIA's matrix units, a float32 product takes three products in TF32. The default of tl.dot would be one.
    """
    return "tf32x3" if target.backend == "cuda" and dtype == torch.float32 else "ieee"


def core_dtype(target: Target, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of `root_core` and of inverses of an S: float64, or the factors' ``dtype`` if float64 is slow.

    "Weak float64" in ``docs/kernels.md`` says why these two alone.
    """
    return dtype if target.arch in WEAK_FLOAT64 else torch.float64


@cache
def products_in(target: Target, dtype: torch.dtype) -> dict[str, Any]:
    """Return a kernel's constants for products in ``dtype``."""
    return {"COMPUTE": triton_dtype(dtype), "PRECISION": product_precision(target, dtype)}


def triton_dtype(dtype: torch.dtype) -> Any:
    """Return the Triton name of a floating-point dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))
