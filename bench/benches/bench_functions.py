"""Every public function over sizes and dtypes, beside other libraries that give the same result.

Each case checks its result against float64 first and does not time a wrong one: where that is a peer's, the run goes on
and the result file says so. ``--full`` takes larger sizes, and lets what is slow there take part in all of them.
"""

from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

from bench.benches.peers import at_best
from bench.benches.tasks import GROUPED, ONE_BY_ONE, OWN, TASKS, Shape, Task, check, together
from bench.benches.timing import TIMER
from bench.gpu.cases import fresh
from bench.gpu.device import Device, size_of

pytestmark = pytest.mark.benchmark(timer=TIMER)

FLOAT64, BFLOAT16 = torch.float64, torch.bfloat16
USUAL = (
    Shape(1024, 64, 32),
    Shape(1024, 64, 32, FLOAT64),
    Shape(1024, 64, 32, data=BFLOAT16),
    Shape(4096, 128, 64),
)
FULL = (*USUAL, Shape(4096, 256, 256), Shape(8192, 256, 256), Shape(16384, 256, 256))
TOY = (Shape(96, 8, 4), Shape(96, 8, 4, FLOAT64), Shape(96, 8, 4, data=BFLOAT16))
# The largest n at which what decomposes a whole matrix, or iterates to full precision, has a part.
MOST_SLOW = 1024
# Factors of a group, by their part of the largest n.
PARTS = (1, 2, 4, 4)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick, full = (metafunc.config.getoption(name) for name in ("quick", "full"))
    kind = "cuda" if torch.cuda.is_available() and not quick else "cpu"
    grouped = metafunc.function is test_grouped
    cases = []
    for name in filter(GROUPED.__contains__, TASKS) if grouped else TASKS:
        for shape in TOY if quick else FULL if full else USUAL:
            if shape.data is None or TASKS[name].takes_half:
                found = TASKS[name].implementations(shape, kind, shape.n if full else MOST_SLOW)
                own = [one for one in found if one in OWN]
                cases.extend((name, by, shape) for by in ([*own, ONE_BY_ONE] if grouped else found))
    metafunc.parametrize(("name", "by", "shape"), cases, ids=str)


@lru_cache(maxsize=1)
def task_of(name: str, shape: Shape, device: Device) -> Task:
    return TASKS[name].make(shape, device)


@lru_cache(maxsize=1)
def group_of(name: str, shape: Shape, device: Device) -> Task:
    """Return a task over factors of several n."""
    # Half as many columns as rows have to hold the rank and what is new.
    least = 2 * (shape.r + shape.k)
    return together(name, [shape._replace(n=max(shape.n // part, least)) for part in PARTS], device)


def measure(task: Task, name: str, by: str, shape: Shape, device: Device, case: Any) -> None:
    sizes = {"n": shape.n, "r": shape.r, "k": shape.k, "dtype": str(shape.dtype).removeprefix("torch.")}
    with case(f"{name} {shape}", by, function=name, shape=str(shape), **sizes) as timed:
        call = task.call(by)
        judged = check(f"{by}, {name} {shape}", call)
        count = device.sets(size_of(call.arguments)) if device.tensors.type == "cuda" else 1
        calls = [partial(call.function, *fresh(call.arguments)) for _ in range(count)]
        found = {"error": judged.error, "orthogonality": judged.orthogonality}
        with at_best(calls[0]) if call.on_numpy else nullcontext() as threads:
            timed(calls, task.work, **found, blas_threads=threads)


def test_function(name, by, shape, device, case) -> None:
    measure(task_of(name, shape, device), name, by, shape, device, case)


def test_grouped(name, by, shape, device, case) -> None:
    measure(group_of(name, shape, device), f"grouped.{name}", by, shape, device, case)
