"""The benchmarks of functions and ops: every task has a right answer, and a wrong one is refused before it is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import brandla
from bench import bench_ops, events, tasks
from bench.gpu import cases
from bench.gpu.device import Stub
from bench.gpu.sizes import TOY
from bench.problems import WrongResultError
from bench.tasks import TASKS, Shape
from brandla_kernels import OPS

ROOT = Path(__file__).parents[1]
SHAPES = (Shape(96, 8, 4), Shape(96, 8, 4, torch.float64))

WRONG = """
import brandla

right = brandla.eigh_update

def wrong(*arguments, **options):
    values, vectors = right(*arguments, **options)
    return brandla.LowRankEigh(values * 1.01, vectors)

brandla.eigh_update = wrong
"""


def spoiled(result: Any) -> Any:
    """Return a result with every number 1 % too large."""
    return tree_map(lambda leaf: 1.01 * leaf if isinstance(leaf, Tensor) else leaf, result)


def refused(call: tasks.Call, spoil: Callable[[Any], Any]) -> bool:
    """Say whether a call is refused once its result is spoiled."""
    try:
        tasks.check("case", call._replace(function=lambda *arguments: spoil(call.function(*arguments))))
    except WrongResultError:
        return True
    return False


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TASKS)
def test_every_implementation_of_a_task_is_right_and_a_wrong_result_is_refused(name: str, shape: Shape) -> None:
    task = TASKS[name](shape, Stub())
    names = tasks.implementations(name, shape, "cpu", most=shape.n)
    assert names[0] == tasks.BRANDLA
    assert set(names[1:]) == set(task.others)
    for one in names:
        tasks.check(one, task.call(one))
        # scikit-learn's model is no tree of tensors.
        if one != tasks.INCREMENTAL:
            assert refused(task.call(one), spoiled)
            assert refused(task.call(one), partial(tree_map, lambda leaf: leaf * float("nan")))


def test_a_basis_that_is_not_orthonormal_is_refused() -> None:
    def rescaled(found: brandla.LowRankEigh) -> brandla.LowRankEigh:
        # U diag(d) Uᵀ is the same, so that the orthogonality alone tells.
        return brandla.LowRankEigh(found.eigenvalues / 1.01**2, found.eigenvectors * 1.01)

    assert refused(TASKS["eigh_update"](SHAPES[0], Stub()).call(tasks.BRANDLA), rescaled)


def test_every_public_function_has_a_task() -> None:
    functions = {name for name in brandla.grouped.__all__ if callable(getattr(brandla, name))}
    assert {name.partition(",")[0] for name in TASKS} == functions


@pytest.mark.parametrize("name", [name for name in TASKS if "centred" not in name])
def test_a_group_is_as_right_as_its_members(name: str) -> None:
    group = tasks.together(name, [SHAPES[0], SHAPES[0]._replace(n=64)], Stub())
    for one in (tasks.BRANDLA, tasks.ONE_BY_ONE):
        tasks.check(one, group.call(one))
        assert refused(group.call(one), spoiled)


@pytest.mark.parametrize("name", OPS)
def test_a_wrong_op_is_refused(name: str) -> None:
    case = next(case for case in cases.cases(TOY) if case.op == name)
    bench_ops.error_of(case, OPS[name], Stub())

    def slightly_off(*arguments: Any) -> Any:
        return spoiled(cases.results(case, OPS[name], arguments))

    with pytest.raises(WrongResultError, match="allowed"):
        bench_ops.error_of(case, slightly_off, Stub())


def run_bench(expression: str, folder: Path, *plugins: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/bench_functions.py",
        "--quick",
        "--benchmark-only",
        "-k",
        expression,
    ]
    options = [part for plugin in plugins for part in ("-p", plugin)]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    # What pytest-benchmark would take for a worker of xdist, in which nothing is timed.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    environment = inherited | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100
    )


def test_the_benchmark_fails_and_times_nothing_where_the_library_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "wrong_update.py").write_text(WRONG, encoding="utf-8")
    done = run_bench("test_function and fp32 and (eigh_update-brandla or svd_append-brandla)", tmp_path, "wrong_update")
    assert done.returncode == 1
    assert "WrongResultError: brandla, eigh_update n=96 r=8 k=4 fp32: error" in done.stdout
    assert "benchmark 'eigh_update" not in done.stdout
    # What is right is timed.
    assert "benchmark 'svd_append n=96 r=8 k=4 fp32'" in done.stdout


class FakeEvent:
    """A CUDA event on a clock that the test sets; its differences have float32's precision, as CUDA's have."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(torch.tensor(1e3 * (other.at - self.at), dtype=torch.float32))


def test_the_event_timer_tells_microseconds_apart_after_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    timer = events.EventTimer()
    FakeEvent.clock = 3600.0
    start = timer()
    FakeEvent.clock += 25e-6
    # Sums of an hour in float64 are good to 1e-12 s, differences of 25 µs in float32 to 1e-11 s.
    assert timer() - start == pytest.approx(25e-6, abs=1e-10)
