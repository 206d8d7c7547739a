"""The ceilings, and what is held to them: each op beside eager torch, and the small core by its order.

Each is checked against float64 first.
"""

from itertools import product
from time import monotonic

import torch

from bench.gpu import cases
from bench.gpu.cases import SMALL, Case
from bench.gpu.device import MOST_SETS
from bench.gpu.frame import Findings
from bench.studies import roofline

# Seconds that a case takes: the check, two timings; and the compilation of all together.
CASE, COMPILATION = 3.0, 30.0
GROUP = "part of the ceiling that binds, float32"
# n and r from which on an op is held to its ceiling.
JUDGED, TOY_JUDGED = (16384, 256), (48, 8)
# r and k of the small core, with one factor and a network's worth.
ORDERS, TOY_ORDERS = ((32, 32), (64, 32), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256)), ((4, 4), (8, 5))
FACTORS = (1, 64)


def ceilings(found: Findings) -> None:
    def measured() -> None:
        for row in roofline.levels(found.ceilings, found.sizes):
            found.row("ceilings", when="at first", **row)

    found.attempt("ceilings", 5, measured)


def run(found: Findings) -> None:
    device, listed = found.device, cases.cases(found.sizes)

    def compiled() -> None:
        start, launches = monotonic(), [launch for case in listed for launch in cases.launches(case, device)]
        problem, done = device.precompile(launches), "recorded, none compiled" if device.dry else "compiled"
        found.add("notes", problem or f"{len(launches)} launches {done}, in {monotonic() - start:.1f} s")

    found.attempt("compilation", COMPILATION, compiled)
    for case in listed:
        found.attempt(f"{case.op}, {case.name}", CASE, _measure, found, case)


def _measure(found: Findings, case: Case, most: int = MOST_SETS) -> None:
    row = roofline.measured(case, found.sizes, found.device, found.ceilings, beside_torch=True, most=most)
    found.row("rows", op=case.op, case=case.name, **row)
    n, r = TOY_JUDGED if found.device.dry else JUDGED
    large = case.n >= n and case.r == case.k == r
    if large and case.dtype == case.data == torch.float32 and case.op not in SMALL:
        part, note = row["of_ceiling"].value, f"bound by {row['bound_by']}"
        found.figure(GROUP, f"{case.op}, {case.name}", part, at_least=0.6, unit="", note=note)


def core(found: Findings) -> None:
    """Time the small core by its order, for one factor and for many, on what is in the cache, as in an update."""
    for (r, k), count, op in product(TOY_ORDERS if found.device.dry else ORDERS, FACTORS, SMALL):
        case = Case(op, 4 * r, r, k, r, count)
        found.attempt(f"{op}, {case.name}", 4, _measure, found, case, 1)
