"""Each op: checked against float64, then its time against the ceiling that binds it, measured here, and eager torch."""

from __future__ import annotations

from functools import partial
from statistics import median
from time import monotonic
from typing import Any

import torch

import brandla
from bench.benches.timing import Interval, of_median
from bench.gpu import cases
from bench.gpu.cases import Case
from bench.gpu.device import measure, replayed, size_of
from bench.gpu.frame import Findings
from brandla_kernels import OPS

# Seconds that a case takes: the check, two timings; and the compilation of all together.
CASE, COMPILATION = 3.0, 30.0
GROUP = "part of the ceiling that binds, float32"
# n and r from which on an op is held to its ceiling.
JUDGED, TOY_JUDGED = (16384, 256), (48, 8)


def ceilings(found: Findings) -> None:
    """Measure what the device does at best."""
    found.attempt("ceilings", 5, _ceilings, found)


def _ceilings(found: Findings) -> None:
    sizes = found.sizes
    limits = measure(found.device, sizes)
    found.row("rates", **{name: rate for name, rate in limits._asdict().items() if name != "samples"})
    for name, times in limits.samples.items():
        rate, unit = getattr(limits, name) / 1e12, "TB/s" if name == "copy" else "TFLOP/s"
        low, high = (rate * median(times) / edge for edge in reversed(of_median(times)[1:]))
        case = f"{name} product of order {sizes.product}"
        case = f"copy of {sizes.copy / 2**20:.4g} MiB, read + write" if name == "copy" else case
        found.figure("ceiling", case, Interval(rate, low, high), unit=unit)


def run(found: Findings) -> None:
    """Measure every case."""
    for name in cases.unknown():
        found.note(f"{name}: no operands are set up for this op, so it is not measured")
    listed = cases.cases(found.sizes)
    found.attempt("compilation", COMPILATION, _compile, found, listed)
    for case in listed:
        found.attempt(f"{case.op}, {case.name}", CASE, _measure, found, case)


def _compile(found: Findings, listed: list[Case]) -> None:
    device, start = found.device, monotonic()
    launched = [case for case in listed if OPS[case.op].launch is not None]
    recorded = (device.recorded(OPS[case.op].launch, *cases.operands(case, device)) for case in launched)
    launches = [launch for one in recorded for launch in one]
    problem, done = device.precompile(launches), "recorded, none compiled" if device.dry else "compiled"
    found.note(problem or f"{len(launches)} launches {done}, in {monotonic() - start:.1f} s")


def _measure(found: Findings, case: Case) -> None:
    device, op, cost = found.device, OPS[case.op], cases.cost(case)
    error, peer_error = cases.check(case, device)
    first = cases.operands(case, device)
    inputs = [first, *(cases.operands(case, device) for _ in range(device.sets(size_of(first)) - 1))]
    times = replayed(device, {"op": op, "torch": partial(torch_form, op)}, inputs, found.sizes.seconds)
    interval, floor = times.median("op"), found.ceilings.floor(cases.work(case))
    fraction, faster = floor.seconds / interval.value, times.ratio("torch", "op")
    found.row(
        "ops",
        **{"op": case.op, "case": case.name, "by": op.implementation(device.tensors.type)[0]},
        **{"µs": 1e6 * interval.value, "TFLOP/s": cost.flops / interval.value / 1e12},
        **{"GB/s": cost.bytes / interval.value / 1e9, "of ceiling": fraction, "bound by": floor.bound_by},
        **{"× torch": faster.value, "error": error, "torch's error": peer_error},
        **{"low µs": 1e6 * interval.low, "high µs": 1e6 * interval.high, "sets": len(inputs), "timed by": times.how},
    )
    n, r = TOY_JUDGED if device.dry else JUDGED
    large = case.size.n >= n and case.size.r == case.size.k == r
    if large and case.dtype == case.data == torch.float32 and case.op not in cases.SMALL:
        note = f"bound by {floor.bound_by}"
        found.figure(GROUP, f"{case.op}, {case.name}", fraction, at_least=0.6, unit="", note=note)


def torch_form(function: Any, *arguments: Any) -> Any:
    """Call an op or a public function with the same products in torch."""
    with brandla.backend("torch"):
        return function(*arguments)
