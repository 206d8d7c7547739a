"""The ceilings, and what is held to them: each op beside eager torch, each update kernel by kernel, and the small core.

Each is checked against float64 first. An update has a process of its own: two profilers cannot both listen to one.
"""

from itertools import product
from statistics import median
from time import monotonic
from timeit import timeit
from typing import Any

import torch

import brandla
from bench.benches import written_out
from bench.benches.problems import DECAY, UPDATES, WEIGHT, WrongResultError
from bench.benches.tasks import BRANDLA, TASKS, Shape, check
from bench.benches.timing import of_median, ratio
from bench.gpu import cases
from bench.gpu.cases import SMALL, Case, Size, forced
from bench.gpu.device import measure, replayed
from bench.gpu.frame import Findings
from bench.profiling import Request, table_of
from bench.studies import roofline
from brandla_kernels import OPS

# Seconds that a case takes: the check, two timings; and the compilation of all together.
CASE, COMPILATION = 3.0, 30.0
GROUP = "part of the ceiling that binds, float32"
# n and r from which on an op is held to its ceiling.
JUDGED, TOY_JUDGED = (16384, 256), (48, 8)
CHOLESKY = "root_update, cholesky"
# The updates, that without an eigendecomposition first.
PROFILED = sorted(UPDATES, key=lambda name: name != CHOLESKY)
KERNELS, CALLS = 15, 100
# n, r, k of the updates, and r, k of the small core, with one factor and a network's worth.
SIZE, TOY = (4096, 256, 256), (64, 8, 8)
ORDERS, TOY_ORDERS = ((32, 32), (64, 32), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256)), ((4, 4), (8, 5))
FACTORS = (1, 64)


def ceilings(found: Findings) -> None:
    def measured() -> None:
        for row in roofline.levels(measure(found.device, found.sizes), found.sizes):
            found.row("ceilings", when="at first", **row)

    found.attempt("ceilings", 5, measured)


def run(found: Findings) -> None:
    listed = cases.cases(found.sizes)
    found.attempt("compilation", COMPILATION, _compile, found, listed)
    for case in listed:
        found.attempt(f"{case.op}, {case.name}", CASE, _measure, found, case)


def _compile(found: Findings, listed: list[Case]) -> None:
    device, start = found.device, monotonic()
    launches = [launch for case in listed for launch in cases.launches(case, device)]
    problem, done = device.precompile(launches), "recorded, none compiled" if device.dry else "compiled"
    found.add("notes", problem or f"{len(launches)} launches {done}, in {monotonic() - start:.1f} s")


def _measure(found: Findings, case: Case) -> None:
    row = roofline.measured(case, found.sizes, found.device, found.ceilings, beside_torch=True)
    found.row("rows", op=case.op, case=case.name, **row)
    n, r = TOY_JUDGED if found.device.dry else JUDGED
    large = case.size.n >= n and case.size.r == case.size.k == r
    if large and case.dtype == case.data == torch.float32 and case.op not in SMALL:
        part, note = row["of_ceiling"].value, f"bound by {row['bound_by']}"
        found.figure(GROUP, f"{case.op}, {case.name}", part, at_least=0.6, unit="", note=note)


# --- Updates


def profile(found: Findings) -> None:
    for name in PROFILED:
        found.attempt(name, 25, _profile, found, name)


def _profile(found: Findings, name: str) -> None:
    device, size = found.device, TOY if found.device.dry else SIZE
    call = TASKS[name].task(Shape(*size), device).call(BRANDLA)
    check(name, call)
    update, (factor, columns) = call.again, call.arguments
    eigh = factor.to_eigh() if isinstance(factor, brandla.LowRankRoot) else factor
    brand = lambda: written_out.brand_update(*eigh, columns, DECAY, WEIGHT)
    ways: dict[str, Any] = {"eager": update, "torch": brand}
    if name == CHOLESKY:
        captured, ways["graph"] = device.capture(update)
        ways["graph"]()
        call.judge(cases.on_cpu(captured)).accept(name)
    taken = device.alternating(ways, 3 * found.sizes.seconds)
    times = {way: [1e6 * seconds for seconds in samples] for way, samples in taken.items()}
    words, calls = "n {}, r {}, k {}".format(*size), 3 if device.dry else CALLS
    # How long the host takes for a call, with the device left to catch up.
    device.synchronize()
    host = 1e6 * timeit(update, number=calls) / calls
    device.synchronize()
    found.row("updates", update=name, **{f"{way} µs": median(times[way]) for way in ways}, host=host)
    if name == CHOLESKY:
        found.figure(name, f"{words}, in a graph", of_median(times["graph"]), unit="µs", at_most=300)
        over_graph = ratio(times["torch"], times["graph"])
        found.figure(name, f"{words}, in a graph: eager torch Brand update / it", over_graph, at_least=10)
    found.figure(name, f"{words}: eager torch Brand update / it", ratio(times["torch"], times["eager"]))
    try:
        call.judge(brandla.LowRankEigh(*cases.on_cpu(brand()))).accept("eager torch")
    except WrongResultError as error:
        found.add("notes", f"the eager torch update would not pass the same check: {error}")
    for row in table_of(Request(name, *size), device, found.ceilings)[: KERNELS + 1]:
        found.row(f"kernels of {name}, {words}", **row)


# --- The small core


def core(found: Findings) -> None:
    """Time the small core by its order, for one factor and for many."""
    for (r, k), count, op in product(TOY_ORDERS if found.device.dry else ORDERS, FACTORS, SMALL):
        case = Case(op, Size(4 * r, r, k, r, count))
        found.attempt(f"{op}, {case.name}, r {r}", 4, _core, found, case)


def _core(found: Findings, case: Case) -> None:
    error, _ = cases.check(case, found.device)
    op, inputs = OPS[case.op], [cases.operands(case, found.device)]
    times, how = replayed(found.device, {"op": op, "torch": forced(op)}, inputs, found.sizes.seconds)
    own, others = (1e6 * median(times[name]) for name in ("op", "torch"))
    columns: dict[str, Any] = {"µs": own, "torch form µs": others, "× torch": others / own, "error": error}
    sizes = {"order": case.order, "r": case.size.r, "factors": case.size.cores}
    found.row("small core", op=case.op, **sizes, **columns, how=how)
