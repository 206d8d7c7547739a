"""One small call of every op: single, batched and grouped, at sizes that fill no tile. For compute-sanitizer.

``python -m bench.gpu.small_cases [--quick]`` runs on the GPU if there is one and on the CPU otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu import cases
from bench.gpu.cases import Case, Size
from bench.gpu.device import Device, Gpu, Stub
from brandla_kernels import OPS

# The second is wider than the kernels that keep a Gram matrix in registers allow.
SIZES = ((37, 5, 3), (150, 70, 67))
DTYPES = (torch.float32, torch.float64)


def main() -> None:
    """Call every op, and wait for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one size and one dtype")
    quick = parser.parse_args().quick
    device = Gpu() if torch.cuda.is_available() else Stub()
    _compile(device, quick)
    for name, arguments in _calls(device, quick):
        op = OPS[name.partition(",")[0]]
        op(*arguments)
        device.synchronize()
        print(f"called {name}", flush=True)


def _compile(device: Device, quick: bool) -> None:
    """Compile all kernels together, so that the calls find them."""
    calls = ((OPS[name.partition(",")[0]].launch, arguments) for name, arguments in _calls(device, quick))
    device.precompile([one for launch, arguments in calls if launch for one in device.recorded(launch, *arguments)])


def _calls(device: Device, quick: bool) -> Iterator[tuple[str, Any]]:
    for name in OPS:
        if name not in cases.OPERANDS:
            continue
        for n, r, k in SIZES[:1] if quick else SIZES:
            for dtype in DTYPES[:1] if quick else DTYPES:
                yield from _of_op(name, Size(n, r, k, 41, 2), dtype, device)


def _of_op(name: str, size: Size, dtype: torch.dtype, device: Device) -> Iterator[tuple[str, Any]]:
    single = cases.operands(Case(name, size, dtype, dtype), device)
    words = f"{name}, n {size.n}, r {size.r}, k {size.k}, {dtype}"
    yield words, single
    smaller = Size(size.n - 7, max(size.r - 2, 1), max(size.k - 1, 1), size.width - 8, size.cores)
    if not OPS[name].signature.lists:
        return
    yield f"{words}, batched", _batched(name, single)
    other = cases.operands(Case(name, smaller, dtype, dtype), device)
    # What is no matrix is one for all problems.
    yield f"{words}, grouped", cases.grouped(name, [single, other])


def _batched(name: str, single: tuple[Any, ...]) -> tuple[Any, ...]:
    positions = {operand.position for operand in OPS[name].signature.operands}
    return tuple(
        torch.stack([part, part]) if position in positions and isinstance(part, Tensor) else part
        for position, part in enumerate(single)
    )


if __name__ == "__main__":
    main()
