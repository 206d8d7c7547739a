"""Each op: checked against float64, then its time against the ceiling that binds it, measured here, and eager torch."""

from time import monotonic

import torch

from bench.gpu import cases
from bench.gpu.cases import Case
from bench.gpu.device import measure
from bench.gpu.frame import Findings

# Seconds that a case takes: the check, two timings; and the compilation of all together.
CASE, COMPILATION = 3.0, 30.0
GROUP = "part of the ceiling that binds, float32"
# n and r from which on an op is held to its ceiling.
JUDGED, TOY_JUDGED = (16384, 256), (48, 8)


def ceilings(found: Findings) -> None:
    found.attempt("ceilings", 5, _ceilings, found)


def _ceilings(found: Findings) -> None:
    sizes = found.sizes
    limits = measure(found.device, sizes)
    found.row("rates", **{name: rate for name, rate in limits._asdict().items() if name != "samples"})
    for name, rates in limits.intervals():
        case = f"{name} product of order {sizes.product}"
        case = f"copy of {sizes.copy / 2**20:.4g} MiB, read + write" if name == "copy" else case
        unit = "TB/s" if name == "copy" else "TFLOP/s"
        found.figure("ceiling", case, tuple(rate / 1e12 for rate in rates), unit=unit)


def run(found: Findings) -> None:
    for name in cases.unknown():
        found.note(f"{name}: no operands are set up for this op, so it is not measured")
    listed = cases.cases(found.sizes)
    found.attempt("compilation", COMPILATION, _compile, found, listed)
    for case in listed:
        found.attempt(f"{case.op}, {case.name}", CASE, _measure, found, case)


def _compile(found: Findings, listed: list[Case]) -> None:
    device, start = found.device, monotonic()
    launches = [launch for case in listed for launch in cases.launches(case, device)]
    problem, done = device.precompile(launches), "recorded, none compiled" if device.dry else "compiled"
    found.note(problem or f"{len(launches)} launches {done}, in {monotonic() - start:.1f} s")


def _measure(found: Findings, case: Case) -> None:
    device, cost = found.device, cases.cost(case)
    timed = cases.timed(case, device, found.ceilings, found.sizes.seconds, beside_torch=True)
    time, part, note = timed.seconds, timed.of_ceiling.value, f"bound by {timed.floor.bound_by}"
    found.row(
        "ops",
        **{"op": case.op, "case": case.name, "by": timed.by, "µs": 1e6 * time.value},
        **{"TFLOP/s": cost.flops / time.value / 1e12, "GB/s": cost.bytes / time.value / 1e9},
        **{"of ceiling": part, "bound by": timed.floor.bound_by, "× torch": timed.times.ratio("torch", "op").value},
        **{"error": timed.error, "torch's error": timed.torch_error},
        **{"low µs": 1e6 * time.low, "high µs": 1e6 * time.high, "sets": timed.sets, "timed by": timed.times.how},
    )
    n, r = TOY_JUDGED if device.dry else JUDGED
    large = case.size.n >= n and case.size.r == case.size.k == r
    if large and case.dtype == case.data == torch.float32 and case.op not in cases.SMALL:
        found.figure(GROUP, f"{case.op}, {case.name}", part, at_least=0.6, unit="", note=note)
