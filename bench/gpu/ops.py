"""Single ops: small calls, then the ceilings, each op beside eager torch, and the small core by its order.

The small calls fill no tile and are checked against the torch form, the others against float64. ``python -m
bench.gpu.ops`` makes the small calls without a record, for compute-sanitizer; ``--quick`` makes fewer of them.
"""

import sys
from collections.abc import Iterator
from itertools import product
from time import monotonic
from typing import Any

import torch

from bench.benches.problems import require
from bench.gpu import cases
from bench.gpu.cases import SMALL, Case, cloned, operands, results_of
from bench.gpu.device import MOST_SETS, Device, Gpu, Stub
from bench.gpu.frame import Findings
from bench.studies import roofline
from brandla_kernels import OPS

# n, r, k, the width, and the number of small matrices. The second r and k are too large for the kernels that keep a
# Gram matrix in registers.
SIZES = ((37, 5, 3, 41, 2), (150, 70, 67, 41, 2))
# Seconds for a case (the check and two timings), and for the compilation of all cases together.
CASE, COMPILATION = 3.0, 30.0
GROUP = "part of the ceiling that binds, float32"
JUDGED, TOY_JUDGED = (16384, 256), (48, 8)  # n and r from which an op has to come close to its ceiling
# r and k of the small core, and the number of factors: one, or a network's.
ORDERS, TOY_ORDERS = ((32, 32), (64, 32), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256)), ((4, 4), (8, 5))
FACTORS = (1, 64)


# --- Small calls: one problem, a batch and a list


def smoke(findings: Findings) -> None:
    for name in OPS:
        findings.attempt(name, COMPILATION, _small_calls, findings, name)


def _small_calls(findings: Findings, name: str) -> None:
    start, most, count, op = monotonic(), 0.0, 0, OPS[name]
    for words, case, arguments in calls(name, findings.device, quick=findings.device.dry):
        form = op.grouped_form if isinstance(arguments[0], list) else op.torch_form
        result, of_torch = (results_of(call, cloned(arguments)) for call in (op, form))
        used = cases.relative_error(result, of_torch) / cases.error_allowed(case)
        findings.device.synchronize()
        # Both the op and the torch form may be off from float64 by the error allowed.
        require(used <= 2, f"{words}: {used:.2g} times the error allowed")
        most, count = max(most, used), count + 1
    findings.row("smoke", op=name, calls=count, **{"of the error allowed": most / 2, "s": monotonic() - start})


def calls(name: str, device: Device, *, quick: bool) -> Iterator[tuple[str, Case, tuple[Any, ...]]]:
    """Yield small calls of an op: their words, the case, and the arguments."""
    signature = OPS[name].signature
    positions = {operand.position for operand in signature.operands}
    for size, dtype in list(product(SIZES, (torch.float32, torch.float64)))[: 1 if quick else None]:
        case = Case(name, *size, dtype, dtype)
        single, words = operands(case, device), f"{name}, n {case.n}, r {case.r}, k {case.k}, {dtype}"
        yield words, case, single
        if signature.lists:
            twice = (torch.stack([part, part]) if index in positions else part for index, part in enumerate(single))
            yield f"{words}, batched", case, tuple(twice)
            smaller = case._replace(n=case.n - 7, r=case.r - 2, k=case.k - 1, width=case.width - 8)
            yield f"{words}, grouped", case, cases.grouped(name, [single, operands(smaller, device)])


# --- Times beside the ceilings


def ceilings(findings: Findings) -> None:
    def measure() -> None:
        for row in roofline.ceiling_rows(findings.ceilings, findings.sizes):
            findings.row("ceilings", when="at first", **row)

    findings.attempt("ceilings", 5, measure)


def run(findings: Findings) -> None:
    device, listed = findings.device, cases.cases(findings.sizes)

    def compiled() -> None:
        start, launches = monotonic(), [launch for case in listed for launch in cases.launches(case, device)]
        problem, done = device.precompile(launches), "recorded, none compiled" if device.dry else "compiled"
        findings.add("notes", problem or f"{len(launches)} launches {done}, in {monotonic() - start:.1f} s")

    findings.attempt("compilation", COMPILATION, compiled)
    for case in listed:
        findings.attempt(f"{case.op}, {case.name}", CASE, _measure, findings, case)


def _measure(findings: Findings, case: Case, most: int = MOST_SETS) -> None:
    row = roofline.measure_op(case, findings.sizes, findings.device, findings.ceilings, beside_torch=True, most=most)
    findings.row("rows", op=case.op, case=case.name, **row)
    n, r = TOY_JUDGED if findings.device.dry else JUDGED
    large = case.n >= n and case.r == case.k == r
    if large and case.dtype == case.data == torch.float32 and case.op not in SMALL:
        part, note = row["of_ceiling"].value, f"bound by {row['bound_by']}"
        findings.figure(GROUP, f"{case.op}, {case.name}", part, at_least=0.6, unit="", note=note)


def core(findings: Findings) -> None:
    """Time the small core by its order, for one factor and for many, from the cache as in an update."""
    for (r, k), count, op in product(TOY_ORDERS if findings.device.dry else ORDERS, FACTORS, SMALL):
        case = Case(op, 4 * r, r, k, r, count)
        findings.attempt(f"{op}, {case.name}", 4, _measure, findings, case, 1)


if __name__ == "__main__":
    _device, _quick = Gpu() if torch.cuda.is_available() else Stub(), "--quick" in sys.argv
    _all = [(words, OPS[name], args) for name in OPS for words, _, args in calls(name, _device, quick=_quick)]
    # Compiles all kernels together, before the calls.
    _device.precompile([launch for _, op, args in _all if op.launch for launch in _device.recorded(op.launch, *args)])
    for words, op, args in _all:
        op(*args)
        _device.synchronize()
        print(f"called {words}", flush=True)
