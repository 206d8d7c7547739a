"""One op, or one public function, at one size: where its time goes, kernel by kernel. Run by ``make profile OP=…``.

Times are those of torch's profiler. On a GPU each kernel of brandla says how many flops and bytes a launch takes
(`brandla_kernels._kernels.launch`), and what torch starts by itself has a time only. On a CPU torch knows of flops.
"""

import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Annotated, Any
from unittest import mock

import pandas as pd
import torch
import typer
from rich.console import Console
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.benches.problems import UPDATES
from bench.benches.tasks import BRANDLA, TASKS, Shape
from bench.frame import pages
from bench.frame.facts import in_words
from bench.frame.study import machine_of
from bench.gpu import cases
from bench.gpu.cases import FULL, Case
from bench.gpu.device import Ceilings, Device, Gpu, Stub, Work, measure
from brandla_kernels import OPS

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
FUNCTIONS = (*UPDATES, "damped_solve", "randomized_eigh")
NAMES = (*sorted(OPS), *FUNCTIONS)
# Calls before a measurement; calls of one at least, so that their mean says something; and calls between the marks of
# a run under ncu or nsys: ncu repeats each kernel itself, and slowly.
WARM_UP, FEWEST, BARE_CALLS = 3, 10, 3
SHOWN = 12
# On a CPU the ceilings are of what its caches do not hold and its cores do in milliseconds.
CPU_SIZES = replace(FULL, copy=2**28, product=1024)
FLOPS = {"flops16": "bf16", "flops32": "float32", "flops64": "float64"}
Row = dict[str, Any]


def refusal(case: Case) -> str | None:
    """Say why an op, or a function, cannot be called so."""
    function, half, dtype = case.op in FUNCTIONS, case.data.itemsize == 2, str(case.data).removeprefix("torch.")
    if case.r > case.n:
        return f"R must be at most N = {case.n}, as a basis has orthonormal columns; got {case.r}"
    if function and case.r + case.k > case.n:
        return f"R + K must be at most N = {case.n} for {case.op}; got {case.r + case.k}"
    if function and (dtype == "float64" or (half and case.op not in UPDATES)):
        return f"DTYPE {dtype} is not set up for {case.op}; use float32"
    if not function and half and all(operand.kind != "Data" for operand in OPS[case.op].signature.operands):
        return f"DTYPE {dtype} is that of data columns, and {case.op} takes none; use float32 or float64"
    return None


def prepare(case: Case, device: Device) -> list[Callable[[], Any]]:
    """Return calls: of an op on different tensors, so that none finds its own in the cache."""
    if case.op in FUNCTIONS:
        shape = Shape(case.n, case.r, case.k, data=None if case.data == case.dtype else case.data)
        return [TASKS[case.op].task(shape, device).call(BRANDLA).again] * FEWEST
    inputs = cases.inputs(case, device)
    return [partial(OPS[case.op], *arguments) for arguments in inputs] * -(-FEWEST // len(inputs))


def made(calls: list[Callable[[], Any]], device: Device) -> None:
    for call in calls:
        call()
    device.synchronize()


# --- Kernels of some calls, as rows of what was measured


def told(calls: list[Callable[[], Any]], device: Device) -> list[Row]:
    """Return what the kernels of brandla tell a profiler of each launch; no torch form tells anything."""
    if device.dry:
        return []
    from triton import knobs

    found: list[Row] = []
    with mock.patch.object(knobs.runtime.launch_enter_hook, "calls", [lambda launch: found.append(launch.get())]):
        made(calls, device)
    named = lambda launch: {FLOPS.get(name, name): value for name, value in launch.items()}
    # The sizes of a launch follow its kernel's name.
    return [named(launch) | {"kernel": launch["name"].partition(" [")[0]} for launch in found]


def timed(calls: list[Callable[[], Any]], device: Device, bits: int) -> list[Row]:
    """Return times by torch's profiler: of kernels, or on a CPU of torch's own calls, with the flops that it knows of.

    Torch does not say in which precision its flops are: in that of the
    numbers that the op multiplies, of so many bits.
    """
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not device.dry)
    # With acc_events torch keeps events over several starts; without, it warns of that, though there is but one.
    with torch.profiler.profile(activities=kinds, with_flops=True, record_shapes=True, acc_events=True) as profiler:
        made(calls, device)
    # On a GPU the time of a call, or of a named range, is that of the kernels below it.
    kernel = lambda event: event.device_type != DeviceType.CPU and not event.is_user_annotation
    time = "self_cpu_time_total" if device.dry else "self_device_time_total"
    rows = [
        {"kernel": each.key, "launches": each.count, "ns": 1e3 * getattr(each, time), FLOPS[f"flops{bits}"]: each.flops}
        for each in profiler.key_averages()
        if device.dry or kernel(each)
    ]
    return [row for row in rows if row["ns"] > 0]


def table_of(case: Case, device: Device, limits: Ceilings) -> list[Row]:
    """Return a row a kernel of one call, the longest first, and one of all together, which has the op's own cost."""
    calls = prepare(case, device)
    made(calls[:WARM_UP], device)
    found = told(calls, device) + timed(calls, device, 8 * case.dtype.itemsize)
    return rows_of(found, len(calls), limits, None if case.op in FUNCTIONS else case)


def rows_of(found: list[Row], calls: int, limits: Ceilings, case: Case | None = None) -> list[Row]:
    """Return measured rows summed by kernel, divided by the calls, with rates and the part of the ceilings."""
    measures = ["launches", "ns", *Work._fields]
    measured = pd.DataFrame(found, columns=["kernel", *measures]).fillna(0)
    summed = measured.groupby("kernel", sort=False)[measures].sum() / calls
    summed = summed[summed["launches"] > 0].sort_values("ns", ascending=False, kind="stable").reset_index()
    total = summed["ns"].sum() / 1e9

    def row(each: Row) -> Row:
        """Return rates and the part of the ceiling that binds; None of what is not known."""
        seconds, work = each["ns"] / 1e9, Work(*(each[name] for name in Work._fields))
        times = {"µs": 1e6 * seconds, "% of all": 100 * seconds / max(total, 1e-12)}
        known: Row = dict.fromkeys(("TFLOP/s", "GB/s", "of ceiling", "bound by"))
        if any(work) and seconds:
            floor, flops = limits.floor(work), work.float32 + work.bf16 + work.float64
            known = {"TFLOP/s": flops / seconds / 1e12, "GB/s": work.bytes / seconds / 1e9 if work.bytes else None}
            known |= {"of ceiling": floor.seconds / seconds, "bound by": floor.bound_by}
        return {"kernel": each["kernel"], "launches": float(each["launches"]), **times, **known}

    least = (cases.work(case) if case else Work())._asdict()
    every, *rows = map(row, [{"kernel": "all", **summed[measures].sum(), **least}, *summed.to_dict("records")])
    if case:
        # The rate is of the whole cost; the ceiling, of what cannot be left out.
        flops, moved = cases.cost(case)
        every |= {"TFLOP/s": flops / total / 1e12, "GB/s": moved / total / 1e9}
    return [every, *rows]


# --- The command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Op, Dtype = (StrEnum(name, {each: each for each in known}) for name, known in (("Op", NAMES), ("Dtype", DTYPES)))


@app.command()
def main(
    op: Annotated[Op, typer.Option(help="an op of brandla_kernels, or a public function")],
    n: Annotated[int, typer.Option(min=1, help="rows")] = 16384,
    r: Annotated[int, typer.Option(min=1, help="rank")] = 256,
    k: Annotated[int, typer.Option(min=1, help="columns")] = 256,
    m: Annotated[int, typer.Option(min=1, help="columns of W, or of the matrix of a sketch")] = 4096,
    cores: Annotated[int, typer.Option(min=1, help="matrices of an op on small ones")] = 32,
    dtype: Annotated[Dtype, typer.Option(help="half precision is that of data columns")] = Dtype.float32,
    bare: Annotated[bool, typer.Option("--bare", help="only call it: for ncu and nsys")] = False,
) -> None:
    """Time, rates and part of the ceilings, kernel by kernel; status 2 for what cannot be profiled."""
    data = DTYPES[dtype.value]
    case = Case(op.value, n, r, k, m, cores, torch.float32 if data.itemsize == 2 else data, data)
    if (reason := refusal(case)) is not None:
        raise typer.BadParameter(reason)
    device = Gpu() if torch.cuda.is_available() else Stub()
    if bare:
        calls = prepare(case, device)
        # First to compile, then between the marks that ncu and nsys wait for.
        made(calls[:WARM_UP], device)
        measured = torch.cuda.profiler.profile() if not device.dry else nullcontext()
        with measured, torch.autograd.profiler.emit_nvtx(enabled=not device.dry):
            made(calls[:BARE_CALLS], device)
        return
    limits = measure(device, CPU_SIZES if device.dry else FULL)
    rows, console = table_of(case, device, limits), Console(highlight=False)
    console.print(f"{case.op}: n {n}, r {r}, k {k}, m {m}, dtype {dtype.value}, cores {cores}")
    console.print(in_words(machine_of(device)), style="dim")
    console.print(
        f"ceilings of this run: copy {limits.copy.value / 1e9:.4g} GB/s, float32 {limits.accurate / 1e12:.3g}, float64"
        f" {limits.float64.value / 1e12:.3g}, bf16 {limits.bf16.value / 1e12:.3g} TFLOP/s"
    )
    by = "one call, by torch's profiler" + (", the torch form on a CPU" if device.dry else "")
    pages.show(pages.on_terminal(pd.DataFrame(rows[: SHOWN + 1]), by), console)
    if len(rows) > SHOWN + 1:
        console.print(f"and {len(rows) - SHOWN - 1} more")
    console.print("\nTo go deeper, on a machine with a GPU:")
    console.print(*deeper(case, device), sep="\n", soft_wrap=True)


def deeper(case: Case, device: Device) -> list[str]:
    """Return the lines of Nsight Compute and Nsight Systems that look at the same calls."""
    asked = {"op": case.op, "n": case.n, "r": case.r, "k": case.k, "m": case.width}
    asked |= {"dtype": str(case.data).removeprefix("torch."), "cores": case.cores}
    words = [part for name, value in asked.items() for part in (f"--{name}", str(value))]
    bare = shlex.join(["python", "-m", "bench.profiling", "--bare", *words])
    launches = [] if case.op in FUNCTIONS else cases.launches(case, device)
    kernels = "|".join(dict.fromkeys(launch.name for launch in launches))
    name, only = shlex.quote(case.op), f" --kernel-name {shlex.quote('regex:' + kernels)}" if kernels else ""
    return [
        f"ncu --clock-control none --set full --profile-from-start off{only} --export {name} {bare}",
        f"nsys profile --trace cuda,nvtx --capture-range cudaProfilerApi --output {name} {bare}",
    ]


if __name__ == "__main__":
    app()
