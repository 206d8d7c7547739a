"""The time of one op, or of one public function, at one size, kernel by kernel. Run by ``make profile OP=…``.

Times are those of torch's profiler. On a GPU, each kernel of brandla reports the flops and bytes of a launch
(`brandla_kernels._kernels.launch`), and torch's own kernels have only a time. On a CPU, torch reports some flops.
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
from bench.frame.facts import facts_text
from bench.frame.study import Row, machine_of
from bench.gpu import cases
from bench.gpu.cases import FULL, Case
from bench.gpu.device import Ceilings, Device, Gpu, Stub, Work, measure_ceilings
from brandla_kernels import OPS

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
FUNCTIONS = (*UPDATES, "damped_solve", "randomized_eigh")
NAMES = (*sorted(OPS), *FUNCTIONS)
# Calls before a measurement; the fewest calls in one, for a meaningful mean; and the calls between the marks of a run
# under ncu or nsys, few because ncu slowly repeats each kernel by itself.
WARM_UP, FEWEST, BARE_CALLS = 3, 10, 3
SHOWN = 12
# On a CPU, a copy that its caches do not hold, and products of some milliseconds.
CPU_SIZES = replace(FULL, copy=2**28, product=1024)
FLOPS = {"flops16": "bf16", "flops32": "float32", "flops64": "float64"}


def reason_against(case: Case) -> str | None:
    """Return why an op or a function cannot be called like this; None if it can."""
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


def calls_of(case: Case, device: Device) -> list[Callable[[], Any]]:
    """Return calls; those of an op are on different tensors, so none of them is in the cache."""
    if case.op in FUNCTIONS:
        shape = Shape(case.n, case.r, case.k, data=None if case.data == case.dtype else case.data)
        return [TASKS[case.op].task(shape, device).call(BRANDLA).again] * FEWEST
    inputs = cases.inputs(case, device)
    return [partial(OPS[case.op], *arguments) for arguments in inputs] * -(-FEWEST // len(inputs))


def make_calls(calls: list[Callable[[], Any]], device: Device) -> None:
    for call in calls:
        call()
    device.synchronize()


# --- The kernels of some calls


def reported_launches(calls: list[Callable[[], Any]], device: Device) -> list[Row]:
    """Return what brandla's kernels report of each launch to a profiler; torch forms report nothing."""
    if device.dry:
        return []
    from triton import knobs

    launches: list[Row] = []
    with mock.patch.object(knobs.runtime.launch_enter_hook, "calls", [lambda launch: launches.append(launch.get())]):
        make_calls(calls, device)
    renamed = lambda launch: {FLOPS.get(name, name): value for name, value in launch.items()}
    # The kernel's name comes before the sizes of the launch.
    return [renamed(launch) | {"kernel": launch["name"].partition(" [")[0]} for launch in launches]


def profiled_times(calls: list[Callable[[], Any]], device: Device, bits: int) -> list[Row]:
    """Return times by torch's profiler: of kernels, or on a CPU of torch's own calls with the flops that torch reports.

    torch does not report the precision of the flops, so they count for the op's precision of so many bits.
    """
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not device.dry)
    # Without acc_events, torch warns that it forgets the events of earlier starts, though there are none.
    with torch.profiler.profile(activities=kinds, with_flops=True, record_shapes=True, acc_events=True) as profiler:
        make_calls(calls, device)
    # On a GPU, the time of a call or of a named range repeats that of its kernels.
    kernel = lambda event: event.device_type != DeviceType.CPU and not event.is_user_annotation
    time = "self_cpu_time_total" if device.dry else "self_device_time_total"
    events = [event for event in profiler.key_averages() if (device.dry or kernel(event)) and getattr(event, time) > 0]
    row = lambda event: {"kernel": event.key, "launches": event.count, "ns": 1e3 * getattr(event, time)}
    return [row(event) | {FLOPS[f"flops{bits}"]: event.flops} for event in events]


def table_of(case: Case, device: Device, limits: Ceilings) -> list[Row]:
    """Return a row of rates and parts of the ceilings for a whole call, then one for each kernel, the longest first."""
    calls, is_op = calls_of(case, device), case.op not in FUNCTIONS
    make_calls(calls[:WARM_UP], device)
    measured = reported_launches(calls, device) + profiled_times(calls, device, 8 * case.dtype.itemsize)
    columns = ["launches", "ns", *Work._fields]
    kernels = pd.DataFrame(measured, columns=["kernel", *columns]).fillna(0).groupby("kernel", sort=False)
    kernels = kernels[columns].sum() / len(calls)
    kernels = kernels[kernels["launches"] > 0].sort_values("ns", ascending=False, kind="stable").reset_index()
    total = kernels["ns"].sum() / 1e9

    def row(kernel: Row) -> Row:
        """Return the row of a kernel; rates and the part of the ceiling are None if its work is unknown."""
        seconds, work = kernel["ns"] / 1e9, Work(*(kernel[name] for name in Work._fields))
        times = {"µs": 1e6 * seconds, "% of all": 100 * seconds / max(total, 1e-12)}
        rates: Row = dict.fromkeys(("TFLOP/s", "GB/s", "of ceiling", "bound by"))
        if any(work) and seconds:
            floor, flops = limits.floor(work), work.float32 + work.bf16 + work.float64
            rates = {"TFLOP/s": flops / seconds / 1e12, "GB/s": work.bytes / seconds / 1e9 if work.bytes else None}
            rates |= {"of ceiling": floor.seconds / seconds, "bound by": floor.bound_by}
        return {"kernel": kernel["kernel"], "launches": float(kernel["launches"]), **times, **rates}

    least = (cases.work(case) if is_op else Work())._asdict()
    whole, *rows = map(row, [{"kernel": "all", **kernels[columns].sum(), **least}, *kernels.to_dict("records")])
    if is_op:
        # The rates are those of the whole cost. The part of the ceiling counts only the least work.
        flops, moved = cases.cost(case)
        whole |= {"TFLOP/s": flops / total / 1e12, "GB/s": moved / total / 1e9}
    return [whole, *rows]


# --- The command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Op, Dtype = (StrEnum(name, {word: word for word in words}) for name, words in (("Op", NAMES), ("Dtype", DTYPES)))


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
    if (reason := reason_against(case)) is not None:
        raise typer.BadParameter(reason)
    device = Gpu() if torch.cuda.is_available() else Stub()
    if bare:
        calls = calls_of(case, device)
        # The first calls compile; the others run between the marks that ncu and nsys wait for.
        make_calls(calls[:WARM_UP], device)
        measured = torch.cuda.profiler.profile() if not device.dry else nullcontext()
        with measured, torch.autograd.profiler.emit_nvtx(enabled=not device.dry):
            make_calls(calls[:BARE_CALLS], device)
        return
    limits = measure_ceilings(device, CPU_SIZES if device.dry else FULL)
    rows, console = table_of(case, device, limits), Console(highlight=False)
    console.print(f"{case.op}: n {n}, r {r}, k {k}, m {m}, dtype {dtype.value}, cores {cores}")
    console.print(facts_text(machine_of(device)), style="dim")
    console.print(
        f"ceilings of this run: copy {limits.copy.value / 1e9:.4g} GB/s, float32 {limits.accurate / 1e12:.3g}, float64"
        f" {limits.float64.value / 1e12:.3g}, bf16 {limits.bf16.value / 1e12:.3g} TFLOP/s"
    )
    by = "one call, by torch's profiler" + (", the torch form on a CPU" if device.dry else "")
    pages.show(console, pd.DataFrame(rows[: SHOWN + 1]), by)
    if len(rows) > SHOWN + 1:
        console.print(f"and {len(rows) - SHOWN - 1} more")
    console.print("\nTo go deeper, on a machine with a GPU:")
    console.print(*nsight_commands(case, device), sep="\n", soft_wrap=True)


def nsight_commands(case: Case, device: Device) -> list[str]:
    """Return the command lines of Nsight Compute and Nsight Systems for the same calls."""
    options = {"op": case.op, "n": case.n, "r": case.r, "k": case.k, "m": case.width}
    options |= {"dtype": str(case.data).removeprefix("torch."), "cores": case.cores}
    words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
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
