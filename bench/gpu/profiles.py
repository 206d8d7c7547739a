"""Where the time of a call goes, kernel by kernel; and what the host takes for the call of an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brandla
from bench.gpu import cases, factors
from bench.gpu.device import longest, started
from bench.gpu.findings import Bench, Deadline, Findings
from bench.problems import DECAY, WEIGHT
from brandla_kernels import OPS

KERNELS = 15
CALLS = 200
# Sizes at which a kernel takes less time than its call.
SMALL = cases.Size(64, 8, 8, 64, 1)


def run(bench: Bench, found: Findings, time: Deadline) -> None:
    """Profile one op and one update, then time the calls of all ops on the host."""
    for name, call in _profiled(bench).items():
        if found.in_time(f"profile of {name}", time, 0 if bench.device.dry else 4.0):
            with found.case(f"profile of {name}", bench.device):
                _profile(bench, found, name, call)
    if found.in_time("host time of calls", time, 0 if bench.device.dry else 2.0):
        for name in OPS:
            if name in cases.OPERANDS:
                with found.case(f"host time of {name}", bench.device):
                    _host_time(bench, found, name)


def _profiled(bench: Bench) -> dict[str, Callable[[], Any]]:
    n, r, k = bench.sizes.update
    case = factors.steady("subspace_update", n, r, k, bench.sizes.steps, bench.device.tensors)
    factor, columns = case
    coefficients = factor.basis.mT @ columns
    return {
        f"residual, n {n}, r {r}, k {k}": lambda: OPS["residual"](factor.basis, columns, coefficients),
        f"subspace_update, n {n}, r {r}, k {k}": lambda: brandla.subspace_update(
            factor, columns, decay=DECAY, weight=WEIGHT
        ),
    }


def _profile(bench: Bench, found: Findings, name: str, call: Callable[[], Any]) -> None:
    kernels = bench.device.kernels(call)
    total = sum(kernel["µs"] for kernel in kernels)
    found.notes.append(f"{name}: {started(kernels)} launches, {total:.4g} µs in kernels")
    for kernel in longest(kernels, KERNELS):
        found.row(f"kernels of {name}", **kernel, **{"% of all": 100 * kernel["µs"] / max(total, 1e-9)})


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
