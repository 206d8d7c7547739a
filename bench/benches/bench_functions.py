"""Every public function and every op over sizes and dtypes, beside what else gives the same result.

Of a function these are other libraries; of an op, on a GPU, its torch form. Each case checks its result against float64
first and does not time a wrong one: where that is a peer's, or what ``torch.compile`` made, the run goes on and the
result file says so. ``--full`` takes larger sizes, and lets what is slow there take part in all of them.
"""

from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import product
from typing import Any

import pytest
import torch

from bench.benches.peers import at_best
from bench.benches.tasks import BRANDLA, GROUPED, ONE_BY_ONE, OWN, TASKS, TORCH_FORM, Shape, Task, check, together
from bench.benches.timing import TIMER
from bench.gpu import cases
from bench.gpu.cases import Case, fresh
from bench.gpu.device import Device, size_of
from bench.studies import roofline
from brandla_kernels import OPS

pytestmark = pytest.mark.benchmark(timer=TIMER)

FLOAT64, BFLOAT16 = torch.float64, torch.bfloat16
SMALL = Shape(1024, 64, 32)
USUAL = (SMALL, SMALL._replace(dtype=FLOAT64), SMALL._replace(data=BFLOAT16), Shape(4096, 128, 64))
FULL = (*USUAL, *(Shape(n, 256, 256) for n in (4096, 8192, 16384)))
TOY = (Shape(96, 8, 4), Shape(96, 8, 4, FLOAT64), Shape(96, 8, 4, data=BFLOAT16))
# The largest n at which what decomposes a whole matrix, or iterates to full precision, has a part.
MOST_SLOW = 1024
# Factors of a group, by their part of the largest n.
PARTS = (1, 2, 4, 4)
COMPILED = "torch.compile of the torch form"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick, full = (metafunc.config.getoption(name) for name in ("quick", "full"))
    kind = "cuda" if torch.cuda.is_available() and not quick else "cpu"
    if metafunc.function is test_op:
        by = [BRANDLA, TORCH_FORM, COMPILED] if kind == "cuda" else [BRANDLA]
        sizes = cases.TOY if quick else cases.FULL if full else roofline.USUAL
        ops = list(product(cases.cases(sizes), by))
        return metafunc.parametrize(("op_case", "by"), ops, ids=[f"{op.op}-{one}-{shape_of(op)}" for op, one in ops])
    found = []
    for group, names in (("", TASKS), ("grouped.", filter(TASKS.__contains__, GROUPED))):
        for name, shape in product(names, TOY if quick else FULL if full else USUAL):
            if shape.data is None or TASKS[name].takes_half:
                those = TASKS[name].implementations(shape, kind, shape.n if full else MOST_SLOW)
                those = [*(one for one in those if one in OWN), ONE_BY_ONE] if group else those
                found.extend((group + name, by, shape) for by in those)
    return metafunc.parametrize(("name", "by", "shape"), found, ids=str)


def about(function: str, shape: Shape) -> dict[str, Any]:
    """Return what a row says of its case."""
    dtype = str(shape.dtype).removeprefix("torch.")
    return {"function": function, "shape": str(shape), "n": shape.n, "r": shape.r, "k": shape.k, "dtype": dtype}


# --- Functions


@lru_cache(maxsize=1)
def task_of(name: str, shape: Shape, device: Device) -> Task:
    """Return a task; of a grouped function one over factors of several n."""
    if name in TASKS:
        return TASKS[name].task(shape, device)
    # Half as many columns as rows have to hold the rank and what is new.
    least = 2 * (shape.r + shape.k)
    shapes = [shape._replace(n=max(shape.n // part, least)) for part in PARTS]
    return together(name.removeprefix("grouped."), shapes, device)


def test_function(name, by, shape, device, case) -> None:
    task = task_of(name, shape, device)
    with case(f"{name} {shape}", by, **about(name, shape)) as timed:
        call = task.call(by)
        judged = check(f"{by}, {name} {shape}", call)
        count = device.sets(size_of(call.arguments)) if device.tensors.type == "cuda" else 1
        calls = [partial(call.function, *fresh(call.arguments)) for _ in range(count)]
        with at_best(calls[0]) if call.on_numpy else nullcontext() as threads:
            timed(calls, task.work, error=judged.error, orthogonality=judged.orthogonality, blas_threads=threads)


# --- Ops


def shape_of(case: Case) -> Shape:
    return Shape(*case.size[:3], case.dtype, None if case.data == case.dtype else case.data)


@pytest.mark.study("ops")
def test_op(op_case, by, device, case) -> None:
    op, shape = OPS[op_case.op], shape_of(op_case)
    with case(f"{op_case.op} {shape}", by, **about(op_case.op, shape)) as timed:
        call = {BRANDLA: op, TORCH_FORM: cases.forced(op)}.get(by) or torch.compile(op.torch_form, dynamic=False)
        error, _ = cases.check(op_case, device, call)
        on_gpu = device.tensors.type == "cuda"
        inputs = cases.inputs(op_case, device) if on_gpu else [cases.operands(op_case, device)]
        timed([partial(call, *one) for one in inputs], cases.work(op_case), error=error, orthogonality=None)
