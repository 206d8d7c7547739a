"""The benchmarks of functions and ops: every task has a right answer, and a wrong one is refused before it is timed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.utils._pytree import tree_map

import brandla
from bench import bench_ops, events, peers, study_pages, tasks
from bench.gpu import cases
from bench.gpu.cases import TOY
from bench.gpu.device import Stub
from bench.peer_threads import at_best
from bench.problems import LOSS_ALLOWED, WrongResultError
from bench.study import INTERRUPTED
from bench.tasks import TASKS, Shape
from brandla_kernels import OPS

ROOT = Path(__file__).parents[1]
SHAPES = (Shape(96, 8, 4), Shape(96, 8, 4, torch.float64))
FLOATS = ("float32", "float64")

WRONG = """
import brandla

right = brandla.eigh_update

def wrong(*arguments, **options):
    values, vectors = right(*arguments, **options)
    return brandla.LowRankEigh(values * 1.01, vectors)

brandla.eigh_update = wrong
"""


# Two tasks, of which one is all that a run has time for; results go to the folder that is named.
SHORT = """
from pathlib import Path
from bench import peers, results, tasks
from brandla import LowRankEigh

results.ROOT, results.QUICK_FOLDER = Path({folder!r}), Path({folder!r}) / "results"
for name in set(tasks.TASKS) - {{"randomized_eigh", "damped_solve"}}:
    del tasks.TASKS[name]
"""
PEERS_FAIL = """
right = peers.SYMMETRIC["torch.linalg.eigh"].call

def fails(matrix, rank):
    raise RuntimeError("did not converge|in time\\nand more")

def wrong(matrix, rank):
    values, vectors = right(matrix, rank)
    return LowRankEigh(values * 1.1, vectors)

for name, call in {"torch.lobpcg": fails, "torch.linalg.eigh": wrong}.items():
    peers.SYMMETRIC[name] = peers.SYMMETRIC[name]._replace(call=call)
"""
CTRL_C = """
import signal

def stopped(shape, device):
    signal.raise_signal(signal.SIGINT)

tasks.TASKS["damped_solve"] = stopped
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


def run_bench(
    expression: str, folder: Path, *plugins: str, file: str = "functions"
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"bench/bench_{file}.py",
        "--quick",
        "--benchmark-only",
        *(["-k", expression] if expression else []),
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
    assert "2 failed, 2 passed" in (last := done.stdout.splitlines()[-1])
    # What is refused before it is timed is no misuse of the fixture.
    assert "error" not in last


def result_of(done: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    """Return the result file that a run of the functions says it wrote."""
    (path,) = folder.glob("results/*/functions.json")
    assert f"written: {path.relative_to(folder)}" in done.stdout
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_a_peer_that_fails_or_is_wrong_is_named_in_file_and_page_and_the_run_goes_on(tmp_path: Path) -> None:
    plugin = SHORT.format(folder=str(tmp_path)) + PEERS_FAIL
    (tmp_path / "failing_peers.py").write_text(plugin, encoding="utf-8")
    done = run_bench("", tmp_path, "failing_peers")
    assert done.returncode == 0
    found = result_of(done, tmp_path)
    refused = {(row["by"], row["dtype"]): row["reason"] for row in found["refused"]}
    assert set(refused) == {(by, dtype) for by in ("torch.lobpcg", "torch.linalg.eigh") for dtype in FLOATS}
    assert refused["torch.lobpcg", "float32"] == "RuntimeError: did not converge/in time"
    assert "WrongResultError: torch.linalg.eigh, randomized_eigh" in refused["torch.linalg.eigh", "float64"]
    timed = {row["by"] for row in found["rows"]}
    assert {"brandla", "scipy eigsh", "torch.linalg.solve, dense"} <= timed
    assert not timed & {"torch.lobpcg", "torch.linalg.eigh"}
    # What NumPy computes says with how many threads; a short run has one.
    threads = {row["by"]: row["blas_threads"] for row in found["rows"]}
    numpy_peers = {name for name, peer in peers.SYMMETRIC.items() if peer.on_numpy and name in timed}
    assert numpy_peers >= {"scipy eigsh", "scikit-learn randomized_svd"}
    assert threads == {by: 1 if by in numpy_peers else None for by in timed}
    page = "\n".join(study_pages.cases(found, "functions"))
    assert "| scipy eigsh (1 BLAS thread) |" in page
    assert "the row says which" in page
    assert "| randomized_eigh n=96 r=8 k=4 fp32 | torch.lobpcg | RuntimeError: did not converge/in time |" in page


def test_ctrl_c_keeps_the_cases_that_ended_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(SHORT.format(folder=str(tmp_path)) + CTRL_C, encoding="utf-8")
    done = run_bench("", tmp_path, "stopped")
    assert done.returncode == INTERRUPTED
    found = result_of(done, tmp_path)
    assert found["facts"]["interrupted"]
    assert {row["function"] for row in found["rows"]} == {"randomized_eigh"}
    assert "cases are missing" in done.stdout
    assert "The run was interrupted" in "\n".join(study_pages.cases(found, "functions"))


def test_times_of_whole_runs_make_no_row_of_single_calls(tmp_path: Path) -> None:
    done = run_bench("to_accuracy and steps", tmp_path, file="kfac")
    assert "1 passed" in done.stdout
    assert "│ B-KFAC, steps" in done.stdout
    assert "benchmark 'to 94%" not in done.stdout


def test_make_bench_runs_the_files_whose_peers_it_installs() -> None:
    # What an outer make was given is none of this one's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    told = subprocess.run(
        ["make", "--dry-run", "bench"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    files = re.findall(r"bench/bench_(\w+)\.py", told.stdout)
    assert sorted(files) == ["functions", "ops", "updates"]


@pytest.mark.parametrize("quicker", [1, 2])
def test_a_peer_has_the_number_of_threads_that_it_is_quicker_with(
    quicker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    controller = ThreadpoolController()

    def threads() -> set[int]:
        return {pool["num_threads"] for pool in controller.info() if pool["user_api"] == "blas"}

    before = threads()
    with at_best(lambda: time.sleep(0.001 if threads() == {quicker} else 0.1)) as chosen:
        assert chosen == quicker
        assert threads() == {quicker}
    assert threads() == before


@pytest.mark.parametrize("name", ["randomized_eigh", "svd_append, centred"])
def test_the_page_names_what_computes_in_float64_where_the_case_is_in_float32(name: str) -> None:
    task = TASKS[name](SHAPES[0], Stub())
    dtypes = {by: dtype_of(call.function(*call.arguments)) for by, call in task.others.items()}
    doubled = [by for by in tasks.IN_FLOAT64 if by in dtypes]
    assert {by for by, dtype in dtypes.items() if dtype == torch.float64} == set(doubled)
    rows = [{"by": by, "dtype": "float32"} for by in dtypes]
    (note,) = study_pages.peers_of_numpy(rows)
    assert note.endswith(f"the case is in float32: {', '.join(doubled)}.\n")
    assert not list(study_pages.peers_of_numpy([row | {"dtype": "float64"} for row in rows]))


def dtype_of(result: Any) -> torch.dtype:
    """Return the dtype of the singular values, or eigenvectors."""
    found = torch.from_numpy(result.singular_values_) if hasattr(result, "singular_values_") else result[1]
    dtype: torch.dtype = found.dtype
    return dtype


def test_lobpcg_is_right_in_float32_from_whatever_start() -> None:
    call = TASKS["randomized_eigh"](Shape(1024, 64, 32), Stub()).call("torch.lobpcg")
    # With the 1,000 iterations that it has by itself, a start in four ended more than 20,000 ε off orthonormal.
    for seed in range(12, 36):
        torch.manual_seed(seed)
        tasks.check("torch.lobpcg", call)


@pytest.mark.parametrize("name", LOSS_ALLOWED)
@pytest.mark.parametrize("n", [1024, 256])
def test_updates_are_checked_where_a_stream_settles(name: str, n: int) -> None:
    judged = tasks.check(name, TASKS[name](Shape(n, 64, 32), Stub()).call(tasks.BRANDLA))
    # With half as many columns as the rank, one step without eigendecomposition leaves out 7 to 9 % more than the best.
    assert judged.used * LOSS_ALLOWED[name] < 1.01


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
