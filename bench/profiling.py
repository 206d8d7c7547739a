"""One op, or one public function, at one size: where its time goes, kernel by kernel. Run by ``make profile OP=…``.

Times are Proton's on a GPU, torch's profiler's on a CPU. Proton is told by each kernel of brandla how many flops and
bytes a launch takes (`brandla_kernels._kernels.launch`); what torch starts by itself has a time only.
"""

import json
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from torch.profiler import ProfilerActivity

from bench.benches.problems import UPDATES
from bench.benches.tasks import BRANDLA, TASKS, Shape
from bench.frame import pages
from bench.frame.facts import in_words
from bench.frame.study import machine_of
from bench.gpu import cases
from bench.gpu.cases import FULL
from bench.gpu.device import Ceilings, Device, Gpu, Stub, Work, measure
from brandla_kernels import OPS

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = ("bfloat16", "float16")
FUNCTIONS = (*UPDATES, "damped_solve", "randomized_eigh")
NAMES = (*sorted(OPS), *FUNCTIONS)
# Calls before a measurement; calls of one at least, so that their mean says something; and calls between the marks of
# a run under ncu or nsys: ncu repeats each kernel itself, and slowly.
WARM_UP, FEWEST, BARE_CALLS = 3, 10, 3
SHOWN = 12
# On a CPU the ceilings are of what its caches do not hold and its cores do in milliseconds.
CPU_SIZES = replace(FULL, copy=2**28, product=1024)
# What Proton itself computes on the device to know of a launch.
OWN = "__proton"
METRICS = {"count": "launches", "time (ns)": "ns", "flops16": "bf16", "flops32": "float32", "flops64": "float64"}
MEASURED = [*METRICS.values(), "bytes"]


@dataclass(frozen=True)
class Request:
    """An op of `brandla_kernels` or a public function, and its sizes.

    n rows, rank r, k columns, m columns of what is neither tall nor small (W, the matrix of a sketch), and the number
    of ``cores`` of an op on small ones. A half-precision ``dtype`` is that of the data columns beside
    float32.
    """

    op: str
    n: int = 16384
    r: int = 256
    k: int = 256
    m: int = 4096
    dtype: str = "float32"
    cores: int = 32

    def refusal(self) -> str | None:
        function, half = self.op in FUNCTIONS, self.dtype in HALF
        if self.r > self.n:
            return f"R must be at most N = {self.n}, as a basis has orthonormal columns; got {self.r}"
        if function and self.r + self.k > self.n:
            return f"R + K must be at most N = {self.n} for {self.op}; got {self.r + self.k}"
        if function and (self.dtype == "float64" or (half and self.op not in UPDATES)):
            return f"DTYPE {self.dtype} is not set up for {self.op}; use float32"
        if not function and half and all(operand.kind != "Data" for operand in OPS[self.op].signature.operands):
            return f"DTYPE {self.dtype} is that of data columns, and {self.op} takes none; use float32 or float64"
        return None

    @property
    def case(self) -> cases.Case:
        """The op as `make gpu` has it; of a function the sizes and dtypes."""
        own = "float32" if self.dtype in HALF else self.dtype
        size = cases.Size(self.n, self.r, self.k, self.m, self.cores)
        return cases.Case(self.op, size, DTYPES[own], DTYPES[self.dtype])


def prepare(request: Request, device: Device) -> list[Callable[[], Any]]:
    """Return calls: of an op on different tensors, so that none finds its own in the cache."""
    if request.op in FUNCTIONS:
        data = DTYPES[request.dtype] if request.dtype in HALF else None
        task = TASKS[request.op].task(Shape(request.n, request.r, request.k, data=data), device)
        return [task.call(BRANDLA).again] * FEWEST
    inputs = cases.inputs(request.case, device)
    return [partial(OPS[request.op], *arguments) for arguments in inputs] * -(-FEWEST // len(inputs))


def made(calls: list[Callable[[], Any]], device: Device) -> None:
    for call in calls:
        call()
    device.synchronize()


# --- Kernels of some calls, as rows of what was measured


def by_proton(calls: list[Callable[[], Any]], device: Device) -> list[dict[str, Any]]:
    import triton.profiler as proton

    with tempfile.TemporaryDirectory() as folder:
        name = Path(folder) / "profile"
        session = proton.start(str(name), hook="triton")
        try:
            made(calls, device)
        finally:
            proton.finalize(session)
        tree = json.loads(name.with_suffix(".hatchet").read_text(encoding="utf-8"))
    return [row for root in tree if "frame" in root for row in frames(root)]


def frames(node: dict[str, Any], launch: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield what Proton wrote of every frame; below a launch that says what it does, they are the launch's."""
    name, metrics = node["frame"]["name"], node["metrics"]
    if name.startswith(OWN):
        return
    launch = name if "bytes" in metrics else launch
    yield {"kernel": launch or name} | {METRICS.get(metric, metric): value for metric, value in metrics.items()}
    for child in node["children"]:
        yield from frames(child, launch)


def by_torch(calls: list[Callable[[], Any]], device: Device, bits: int) -> list[dict[str, Any]]:
    """Profile the calls by torch: on a CPU its own calls by the time that is theirs alone, with the flops it knows of.

    Torch does not say in which precision these are: in that of the numbers that the op multiplies, of so many bits.
    """
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not device.dry)
    # With acc_events torch keeps events over several starts; without, it warns of that, though there is but one.
    with torch.profiler.profile(activities=kinds, with_flops=True, record_shapes=True, acc_events=True) as profiler:
        made(calls, device)
    rows = []
    for event in profiler.key_averages():
        time, flops = event.self_cpu_time_total if device.dry else event.self_device_time_total, event.flops or 0
        rows.append({"kernel": event.key, "launches": event.count, "ns": 1e3 * time, METRICS[f"flops{bits}"]: flops})
    return [row for row in rows if row["ns"] > 0]


def table_of(request: Request, device: Device, limits: Ceilings) -> list[dict[str, Any]]:
    """Return a row a kernel of one call, the longest first, and one of all together, which has the op's own cost."""
    calls, case = prepare(request, device), request.case
    made(calls[:WARM_UP], device)
    try:
        rows = None if device.dry else by_proton(calls, device)
    except Exception:
        # Proton may find no profiling interface where torch does; flops and bytes are then missing.
        rows = None
    rows = by_torch(calls, device, 8 * case.dtype.itemsize) if rows is None else rows
    return rows_of(rows, len(calls), limits, None if request.op in FUNCTIONS else case)


def rows_of(
    found: list[dict[str, Any]], calls: int, limits: Ceilings, case: cases.Case | None = None
) -> list[dict[str, Any]]:
    """Return measured rows summed by kernel, divided by the calls, with rates and the part of the ceilings."""
    measured = pd.DataFrame(found, columns=["kernel", *MEASURED]).fillna(0)
    summed = measured.groupby("kernel", sort=False)[MEASURED].sum() / calls
    summed = summed[summed["launches"] > 0].sort_values("ns", ascending=False, kind="stable").reset_index()
    total = summed["ns"].sum() / 1e9

    def row(each: dict[str, Any]) -> dict[str, Any]:
        """Return rates and the part of the ceiling that binds; None of what is not known."""
        seconds, work = each["ns"] / 1e9, Work(*(each[name] for name in Work._fields))
        times = {"µs": 1e6 * seconds, "% of all": 100 * seconds / max(total, 1e-12)}
        known: dict[str, Any] = dict.fromkeys(("TFLOP/s", "GB/s", "of ceiling", "bound by"))
        if any(work) and seconds:
            floor, flops = limits.floor(work), work.float32 + work.bf16 + work.float64
            known = {"TFLOP/s": flops / seconds / 1e12, "GB/s": work.bytes / seconds / 1e9 if work.bytes else None}
            known |= {"of ceiling": floor.seconds / seconds, "bound by": floor.bound_by}
        return {"kernel": each["kernel"], "launches": float(each["launches"]), **times, **known}

    least = (cases.work(case) if case else Work())._asdict()
    every, *rows = map(row, [{"kernel": "all", **summed[MEASURED].sum(), **least}, *summed.to_dict("records")])
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
    n: Annotated[int, typer.Option(min=1, help="rows")] = Request.n,
    r: Annotated[int, typer.Option(min=1, help="rank")] = Request.r,
    k: Annotated[int, typer.Option(min=1, help="columns")] = Request.k,
    m: Annotated[int, typer.Option(min=1, help="columns of W, or of the matrix of a sketch")] = Request.m,
    cores: Annotated[int, typer.Option(min=1, help="matrices of an op on small ones")] = Request.cores,
    dtype: Annotated[Dtype, typer.Option(help="half precision is that of data columns")] = Dtype.float32,
    bare: Annotated[bool, typer.Option("--bare", help="only call it: for ncu and nsys")] = False,
) -> None:
    """Time, rates and part of the ceilings, kernel by kernel; status 2 for what cannot be profiled."""
    request = Request(op.value, n, r, k, m, dtype.value, cores)
    if (refusal := request.refusal()) is not None:
        raise typer.BadParameter(refusal)
    device = Gpu() if torch.cuda.is_available() else Stub()
    if bare:
        calls = prepare(request, device)
        # First to compile, then between the marks that ncu and nsys wait for.
        made(calls[:WARM_UP], device)
        measured = torch.cuda.profiler.profile() if not device.dry else nullcontext()
        with measured, torch.autograd.profiler.emit_nvtx(enabled=not device.dry):
            made(calls[:BARE_CALLS], device)
        return
    limits = measure(device, CPU_SIZES if device.dry else FULL)
    rows, console = table_of(request, device, limits), Console(highlight=False)
    sizes = [f"{name} {value}" for name, value in asdict(request).items() if name != "op"]
    console.print(request.op + ": " + ", ".join(sizes))
    console.print(in_words(machine_of(device)), style="dim")
    console.print(
        f"ceilings of this run: copy {limits.copy.value / 1e9:.4g} GB/s, float32 {limits.accurate / 1e12:.3g}, float64"
        f" {limits.float64.value / 1e12:.3g}, bf16 {limits.bf16.value / 1e12:.3g} TFLOP/s"
    )
    by = "torch's profiler, the torch form on a CPU" if device.dry else "Proton"
    pages.show(pages.on_terminal(pd.DataFrame(rows[: SHOWN + 1]), f"one call, by {by}"), console)
    if len(rows) > SHOWN + 1:
        console.print(f"and {len(rows) - SHOWN - 1} more")
    console.print("\nTo go deeper, on a machine with a GPU:")
    console.print(*deeper(request, device), sep="\n", soft_wrap=True)


def deeper(request: Request, device: Device) -> list[str]:
    """Return the lines of Nsight Compute and Nsight Systems that look at the same calls."""
    asked = [part for name, value in asdict(request).items() for part in (f"--{name}", str(value))]
    bare = shlex.join(["python", "-m", "bench.profiling", "--bare", *asked])
    launches = [] if request.op in FUNCTIONS else cases.launches(request.case, device)
    kernels = "|".join(dict.fromkeys(launch.name for launch in launches))
    name, only = shlex.quote(request.op), f" --kernel-name {shlex.quote('regex:' + kernels)}" if kernels else ""
    return [
        f"ncu --clock-control none --set full --profile-from-start off{only} --export {name} {bare}",
        f"nsys profile --trace cuda,nvtx --capture-range cudaProfilerApi --output {name} {bare}",
    ]


if __name__ == "__main__":
    app()
