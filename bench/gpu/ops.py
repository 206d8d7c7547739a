"""Each op: checked against float64, then its time against the ceiling that binds it, torch, and torch.compile."""

from __future__ import annotations

from time import monotonic
from typing import Any

import torch

import brandla
from bench.gpu import cases
from bench.gpu.cases import Case
from bench.gpu.findings import Bench, Deadline, Findings
from bench.gpu.timed import microseconds, replayed, size_of
from brandla_kernels import OPS

# Seconds that a case may take: compilation, the check, two timings. A torch.compile takes longer.
CASE, COMPILED_CASE = 3.0, 25.0
GROUP = "part of the ceiling that binds, float32"


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Measure every case, then the torch forms under torch.compile."""
    for name in cases.unknown():
        found.notes.append(f"{name}: no operands are set up for this op, so it is not measured")
    for name, op in OPS.items():
        if op.launch is None:
            found.notes.append(f"{name}: no kernel is registered; its rows are of the torch form")
    with found.case("compilation", bench.device):
        _compile(bench, found)
    for case in cases.cases(bench.sizes):
        if found.in_time(f"{case.op}, {case.name}", time, CASE):
            with found.case(f"{case.op}, {case.name}", bench.device):
                _measure(bench, found, case)
    for case in _compiled_cases(bench):
        if found.in_time(f"{case.op} under torch.compile", time, COMPILED_CASE if not bench.device.dry else 0):
            with found.case(f"{case.op} under torch.compile, {case.name}", bench.device):
                _against_compiled(bench, found, case)


def served_by(bench: Bench, name: str) -> str:
    """Name what serves an op on the device: its kernels, or the torch form."""
    return OPS[name].implementation(bench.device.tensors.type)[0]


def _compile(bench: Bench, found: Findings) -> None:
    """Compile the kernels of all cases together."""
    device, start = bench.device, monotonic()
    launches = [
        launch
        for case in cases.cases(bench.sizes)
        if OPS[case.op].launch is not None
        for launch in device.recorded(OPS[case.op].launch, *cases.operands(case, device))
    ]
    problem = device.precompile(launches)
    done = "recorded, none compiled" if device.dry else "compiled"
    found.notes.append(problem or f"{len(launches)} launches {done}, in {monotonic() - start:.1f} s")


def _measure(bench: Bench, found: Findings, case: Case) -> None:
    device, op, cost = bench.device, OPS[case.op], cases.cost(case)
    error, peer_error = cases.check(case, device)
    inputs = _inputs(bench, case)
    times = replayed(device, {"op": op, "torch": _torch_backend(case)}, inputs, bench.sizes.seconds)
    interval, floor = times.median("op"), bench.ceilings.floor(cases.work(case))
    fraction, faster = floor.seconds / interval.value, times.ratio("torch", "op")
    found.row(
        "ops",
        **{"op": case.op, "case": case.name, "by": served_by(bench, case.op), "µs": microseconds(interval).value},
        **{"TFLOP/s": cost.flops / interval.value / 1e12, "GB/s": cost.bytes / interval.value / 1e9},
        **{"of ceiling": fraction, "bound by": floor.bound_by, "× torch": faster.value},
        **{"error": error, "torch's error": peer_error, "low µs": 1e6 * interval.low, "high µs": 1e6 * interval.high},
        **{"sets": len(inputs), "timed by": times.how},
    )
    if _is_judged(bench, case):
        found.figure(
            GROUP, f"{case.op}, {case.name}", fraction, at_least=0.6, unit="", note=f"bound by {floor.bound_by}"
        )


def _is_judged(bench: Bench, case: Case) -> bool:
    """Say whether a target is set for the case; the cores have no n."""
    large = case.size.n >= bench.sizes.judged_rows and case.size.r == bench.sizes.judged_rank
    return large and case.dtype == case.data == torch.float32 and case.op not in cases.SMALL


def _inputs(bench: Bench, case: Case) -> list[tuple[Any, ...]]:
    first = cases.operands(case, bench.device)
    return [first, *(cases.operands(case, bench.device) for _ in range(bench.device.sets(size_of(first)) - 1))]


def _torch_backend(case: Case) -> Any:
    """Return the op forced to its torch form: the same products in torch, in the same dtypes."""

    def call(*arguments: Any) -> Any:
        with brandla.backend("torch"):
            return OPS[case.op](*arguments)

    return call


def _compiled_cases(bench: Bench) -> list[Case]:
    n, r = bench.sizes.other_dtypes
    chosen = [
        case
        for case in cases.cases(bench.sizes)
        if case.dtype == case.data == torch.float32 and (case.size.n, case.size.r) == (n, r)
    ]
    return chosen[: bench.sizes.compiled]


def _against_compiled(bench: Bench, found: Findings, case: Case) -> None:
    op = OPS[case.op]
    compiled = bench.device.compiled(op.torch_form)
    inputs = _inputs(bench, case)
    try:
        compiled(*inputs[0])
    except Exception as error:
        bench.device.synchronize()
        found.skipped.append(f"{case.op} does not compile: {type(error).__name__}: {str(error)[:200]}")
        return
    times = replayed(bench.device, {"op": op, "compiled": compiled}, inputs, bench.sizes.seconds)
    found.row(
        "torch.compile of the torch form",
        **{"op": case.op, "case": case.name, "µs": microseconds(times.median("op")).value},
        **{"compiled µs": microseconds(times.median("compiled")).value},
        **{"× torch.compile": times.ratio("compiled", "op").value, "timed by": times.how},
    )
