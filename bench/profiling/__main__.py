"""The command line; run by ``make profile OP=cross_gram N=16384 R=256 K=256 DTYPE=float32``."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from bench.frame.figures import spelled
from bench.gpu import ceilings, facts
from bench.gpu.ceilings import Ceilings
from bench.gpu.device import Device, Gpu, Stub
from bench.gpu.sizes import FULL
from bench.profiling import kernels
from bench.profiling.request import Profiled, Request, kernels_of, prepare

MODULE = "bench.profiling"
SHOWN, WIDTH = 12, 130
# On a CPU the ceilings are of what its caches do not hold and its cores do in milliseconds.
CPU_COPY, CPU_PRODUCT = 2**28, 1024
# Calls between the marks of a run under ncu or nsys: ncu repeats each kernel itself, and slowly.
BARE_CALLS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile one op, or run it bare for another profiler; return 2 for what cannot be profiled."""
    options = _parser().parse_args(arguments)
    request = Request(**{field.name: getattr(options, field.name) for field in fields(Request)})
    try:
        request.check()
    except ValueError as error:
        print(f"python -m {MODULE}: {error}", file=sys.stderr)
        return 2
    device = Gpu() if torch.cuda.is_available() else Stub()
    if options.bare:
        _run_bare(request, device)
        return 0
    profiled = prepare(request, device)
    limits = _ceilings(device, options.ceilings)
    rows = table_of(profiled, device, limits)
    if options.json:
        options.json.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return 0
    # Wider than a narrow terminal, so that nothing is cut.
    console = Console(highlight=False, width=max(Console().width, WIDTH))
    _show(console, request, device, limits, rows)
    console.print("\nTo go deeper, on a machine with a GPU:")
    for line in deeper(request, device):
        console.print(line, soft_wrap=True)
    return 0


def table_of(profiled: Profiled, device: Device, limits: Ceilings) -> list[dict[str, Any]]:
    """Return a row a kernel, the longest first, and one of all together, which has the op's own cost."""
    found = kernels.measure(device, profiled.calls, profiled.bits)
    total = sum(kernel.seconds for kernel in found)
    every = {
        "kernel": "all",
        "launches": sum(kernel.launches for kernel in found),
        "µs": 1e6 * total,
        "% of all": 100.0,
    }
    every |= kernels.rates(profiled.work, total, limits)
    if profiled.cost is not None:
        # The rate is of the whole cost; the ceiling, of what cannot be left out.
        every |= {"TFLOP/s": profiled.cost.flops / total / 1e12, "GB/s": profiled.cost.bytes / total / 1e9}
    return [every, *(kernel.row(total, limits) for kernel in found)]


def deeper(request: Request, device: Device) -> list[str]:
    """Return the lines of Nsight Compute and Nsight Systems that look at the same calls."""
    bare = shlex.join(["python", "-m", MODULE, "--bare", *request.arguments])
    names = kernels_of(request, device)
    name = shlex.quote(request.op)
    only = f" --kernel-name {shlex.quote('regex:' + '|'.join(names))}" if names else ""
    return [
        f"ncu --clock-control none --set full --profile-from-start off{only} --export {name} {bare}",
        f"nsys profile --trace cuda,nvtx --capture-range cudaProfilerApi --output {name} {bare}",
    ]


def _run_bare(request: Request, device: Device) -> None:
    """Call with no profiler of our own: first to compile, then between the marks that ncu and nsys wait for."""
    calls = prepare(request, device).calls
    for call in calls[: kernels.WARM_UP]:
        call()
    device.synchronize()
    marked = not device.dry
    if marked:
        torch.cuda.profiler.start()
    with torch.autograd.profiler.emit_nvtx(enabled=marked):
        for call in calls[:BARE_CALLS]:
            call()
        device.synchronize()
    if marked:
        torch.cuda.profiler.stop()


def _ceilings(device: Device, given: str | None) -> Ceilings:
    if given is not None:
        return Ceilings(**json.loads(given), samples={})
    sizes = replace(FULL, copy=CPU_COPY, product=CPU_PRODUCT) if device.dry else FULL
    return ceilings.measure(device, sizes)


def _show(console: Console, request: Request, device: Device, limits: Ceilings, rows: list[dict[str, Any]]) -> None:
    console.print(request.words)
    console.print(facts.in_words(facts.facts(device.dry)), style="dim")
    console.print(
        f"ceilings of this run: copy {limits.copy / 1e9:.4g} GB/s, float32 {limits.accurate / 1e12:.3g}, float64"
        f" {limits.float64 / 1e12:.3g}, bf16 {limits.bf16 / 1e12:.3g} TFLOP/s"
    )
    by = "torch's profiler, the torch form on a CPU" if device.dry else "Proton"
    table = Table(title=f"one call, by {by}", title_justify="left")
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading in ("kernel", "bound by") else "right", no_wrap=True)
    for row in rows[: SHOWN + 1]:
        table.add_row(*map(_spelled, row.values()))
    console.print(table)
    if len(rows) > SHOWN + 1:
        console.print(f"and {len(rows) - SHOWN - 1} more")


def _spelled(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:g}" if value == round(value) else spelled(value)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=f"python -m {MODULE}", description="Time, rates and part of the ceilings, kernel by kernel.")
    defaults = asdict(Request("cross_gram"))
    parser.add_argument("--op", required=True, help="an op of brandla_kernels, or a public function")
    for name, words in {
        "n": "rows", "r": "rank", "k": "columns", "m": "columns of W, or of the matrix of a sketch",
        "cores": "matrices of cholesky_inverse_core and root_core",
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help=f"{words} ({defaults[name]})")
    parser.add_argument("--dtype", default="float32", help="float32, float64, or bfloat16, float16 for data columns")
    parser.add_argument("--bare", action="store_true", help="only call it: for ncu and nsys")
    parser.add_argument("--json", type=Path, help="write the rows to a file and print nothing")
    parser.add_argument("--ceilings", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
