"""Where the time of a call goes, kernel by kernel; and what the host takes for the call of an op."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.gpu import cases, processes
from bench.gpu.findings import Bench, Deadline, Findings
from bench.profiling.__main__ import table_of
from bench.profiling.request import Request, prepare
from brandla_kernels import OPS

KERNELS = 15
# Seconds of a process that imports torch, compiles what is not cached, and profiles.
PROCESS = 10.0
CEILINGS = ("copy", "float32", "tf32", "bf16", "float64")
CALLS = 200
# Sizes at which a kernel takes less time than its call.
SMALL = cases.Size(64, 8, 8, 64, 1)


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Profile one op and one update, then time the calls of all ops on the host."""
    for request in _requests(bench):
        if found.in_time(f"profile of {request.op}", time, 0 if bench.device.dry else PROCESS):
            with found.case(f"profile of {request.op}", bench.device):
                _profile(bench, found, request, time)
    if found.in_time("host time of calls", time, 0 if bench.device.dry else 2.0):
        for name in OPS:
            if name in cases.OPERANDS:
                with found.case(f"host time of {name}", bench.device):
                    _host_time(bench, found, name)


def _requests(bench: Bench) -> list[Request]:
    n, r, k = bench.sizes.update
    return [Request(op, n, r, k) for op in ("cross_gram", "root_update, cholesky")]


def _profile(bench: Bench, found: Findings, request: Request, time: Deadline) -> None:
    if bench.device.dry:
        rows = table_of(prepare(request, bench.device), bench.device, bench.ceilings)
    else:
        rows = _in_process(bench, request, time)
    every = rows[0]
    found.notes.append(f"{request.words}: {every['launches']:g} launches, {every['µs']:.4g} µs in kernels")
    for row in rows[: KERNELS + 1]:
        found.row(f"kernels of {request.words}", **row)


def _in_process(bench: Bench, request: Request, time: Deadline) -> list[dict[str, Any]]:
    """Profile in a process of its own: two profilers, torch's and Proton, cannot both listen to one."""
    given = {name: getattr(bench.ceilings, name) for name in CEILINGS}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.profiling", *request.arguments, "--json", str(path)]
        finished = processes.run([*command, "--ceilings", json.dumps(given)], time.left())
        if finished.status != 0:
            message = f"python -m bench.profiling ended with {finished.status}: {finished.tail}"
            raise RuntimeError(message)
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return rows


def _host_time(bench: Bench, found: Findings, name: str) -> None:
    float32 = cases.torch.float32
    arguments = cases.operands(cases.Case(name, SMALL, float32, float32), bench.device)
    op, calls = OPS[name], 3 if bench.device.dry else CALLS
    own = bench.device.host_seconds(lambda: op(*arguments), calls)
    plain = bench.device.host_seconds(lambda: op.torch_form(*arguments), calls)
    found.row(
        "host time of one small call",
        **{"op": name, "µs": 1e6 * own, "torch form µs": 1e6 * plain, "more µs": 1e6 * (own - plain)},
    )
