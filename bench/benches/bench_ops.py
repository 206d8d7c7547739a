"""Every op of brandla_kernels over sizes and dtypes: as the dispatcher serves it and, on a GPU, its torch form.

Each case checks its result against float64 first and does not time a wrong one: where that is what ``torch.compile``
made, the run goes on and the result file says so. ``--full`` takes the sizes of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.benches.problems import require
from bench.benches.tasks import BRANDLA, SHORT, TORCH_FORM, forced
from bench.benches.timing import TIMER
from bench.gpu import cases
from bench.gpu.cases import FULL, TOY, Case
from bench.gpu.device import Device, size_of
from bench.studies import roofline
from brandla_kernels import OPS

pytestmark = pytest.mark.benchmark(timer=TIMER)

COMPILED = "torch.compile of the torch form"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a case of every op, size and implementation."""
    quick, full = (metafunc.config.getoption(name) for name in ("quick", "full"))
    sizes = TOY if quick else FULL if full else roofline.USUAL
    gpu = torch.cuda.is_available() and not quick
    by = [BRANDLA, TORCH_FORM, COMPILED] if gpu else [BRANDLA]
    found = [(case, one) for case in cases.cases(sizes) for one in by]
    metafunc.parametrize(("op_case", "by"), found, ids=[f"{case.op}-{one}-{shape(case)}" for case, one in found])


def shape(case: Case) -> str:
    """Return the sizes and dtypes of a case, as the functions have them."""
    size, words = case.size, SHORT[case.dtype]
    data = "" if case.data == case.dtype else f" {SHORT[case.data]} data"
    return f"n={size.n} r={size.r} k={size.k} {words}{data}"


def implementation(case: Case, by: str, device: Device) -> Callable[..., Any]:
    """Return who computes the op."""
    op = OPS[case.op]
    return {BRANDLA: lambda: op, TORCH_FORM: lambda: forced(op), COMPILED: lambda: device.compiled(op.torch_form)}[by]()


def error_of(case: Case, call: Callable[..., Any], device: Device) -> float:
    """Return the error against the torch form in float64; refuse a wrong result."""
    arguments = cases.operands(case, device)
    exact = cases.results(case, OPS[case.op].torch_form, cases.fresh(arguments, torch.float64))
    own = cases.results(case, call, cases.fresh(arguments))
    errors, limit = [relative(*pair) for pair in zip(own, exact, strict=True)], cases.allowed(case)
    # Each by itself: a NaN would hide behind the largest.
    words = ", ".join(f"{error:.1e}" for error in errors)
    require(all(error <= limit for error in errors), f"{case.op}, {shape(case)}: errors {words}, allowed {limit:.1e}")
    return max(errors)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Return ‖Ŷ − Y‖_F / ‖Y‖_F; of what is counted or chosen, 0 or infinity."""
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(got, wanted) else float("inf")
    return float(torch.linalg.vector_norm(got.double() - wanted) / torch.linalg.vector_norm(wanted))


def test_op(op_case, by, device, case) -> None:
    size, words = op_case.size, shape(op_case)
    sizes = {"n": size.n, "r": size.r, "k": size.k, "dtype": str(op_case.dtype).removeprefix("torch.")}
    with case(f"{op_case.op} {words}", by, function=op_case.op, shape=words, **sizes) as timed:
        call = implementation(op_case, by, device)
        error = error_of(op_case, call, device)
        first = cases.operands(op_case, device)
        count = device.sets(size_of(first)) if device.tensors.type == "cuda" else 1
        inputs = [first, *(cases.operands(op_case, device) for _ in range(count - 1))]
        timed([partial(call, *one) for one in inputs], cases.work(op_case), error=error, orthogonality=None)
