"""The benchmarks: every task has a right answer, a wrong answer is refused before it is timed, and runs can be cut."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import brandla
from bench.benches import peers, tasks
from bench.benches.bench_functions import tolerated
from bench.benches.problems import LOSS_ALLOWED, WrongResultError
from bench.benches.tasks import BRANDLA, TASKS, Shape
from bench.frame.figures import Study
from bench.gpu.device import Stub

ROOT = Path(__file__).parents[1]
SHAPE = Shape(96, 8, 4)
# Two tasks are left. One peer raises, one is wrong, and Ctrl-C comes at the last task. Results go to this folder.
PLUGIN = """
import signal
from pathlib import Path
from bench.benches import peers, tasks
from bench.frame import results
from brandla import LowRankEigh

results.ROOT = results.QUICK_FOLDER = Path(__file__).parent
# Background programs of a script inherit that SIGINT is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
right = peers.SYMMETRIC["torch.linalg.eigh"].call

def fails(matrix, rank):
    raise RuntimeError("did not converge|in time\\nand more")

def wrong(matrix, rank):
    values, vectors = right(matrix, rank)
    return LowRankEigh(values * 1.1, vectors)

for name, call in {"torch.lobpcg": fails, "torch.linalg.eigh": wrong}.items():
    peers.SYMMETRIC[name] = peers.SYMMETRIC[name]._replace(call=call)
for name in set(tasks.TASKS) - {"randomized_eigh", "damped_solve"}:
    del tasks.TASKS[name]
stop = lambda shape, device: signal.raise_signal(signal.SIGINT)
tasks.TASKS["damped_solve"] = tasks.TASKS["damped_solve"]._replace(make=stop)
"""


def spoiled(result):
    """Return a result with every number 1 % too large."""
    return tree_map(lambda leaf: 1.01 * leaf if isinstance(leaf, Tensor) else leaf, result)


def assert_refused(call, spoil):
    """Check that a call is refused once its result is spoiled."""
    with pytest.raises(WrongResultError):
        tasks.check("case", call._replace(function=lambda *arguments: spoil(call.function(*arguments))))


@pytest.mark.parametrize("name", TASKS)
def test_every_implementation_is_right_and_a_wrong_result_is_refused(name):
    task = TASKS[name].task(SHAPE, Stub())
    others = TASKS[name].implementations(SHAPE, "cpu", most=SHAPE.n)[1:]
    doubled = set()
    for peer in others:
        call = task.call(peer)
        tasks.check(peer, call)
        result = call.function(*call.arguments)
        leaves = [torch.as_tensor(result.singular_values_)] if peer == peers.INCREMENTAL else tree_leaves(result)
        doubled |= {peer for leaf in leaves if leaf.dtype == torch.float64}
    # The page says that these compute in float64 for every dtype. fbpca does so where it draws.
    if name in ("randomized_eigh", "svd_append, centred"):
        assert doubled == {peer for peer in others if peer.startswith("fbpca") or peer == peers.INCREMENTAL}
    tasks.check(BRANDLA, task.call(BRANDLA))
    assert_refused(task.call(BRANDLA), spoiled)
    assert_refused(task.call(BRANDLA), partial(tree_map, lambda leaf: leaf * float("nan")))


def test_a_basis_that_is_not_orthonormal_is_refused():
    def rescaled(found):
        # U diag(d) Uᵀ stays the same, so only the orthogonality shows the error.
        return brandla.LowRankEigh(found.eigenvalues / 1.01**2, found.eigenvectors * 1.01)

    assert_refused(TASKS["eigh_update"].task(SHAPE, Stub()).call(BRANDLA), rescaled)


def test_every_function_that_is_not_in_place_has_a_task():
    makers = {"backend", "centre", "checked", "keep_dtype", "merge", "track"}
    functions = {name for name in brandla.__all__ if name[0].islower() and not name.endswith("_")}
    assert {name.partition(",")[0] for name in TASKS} == functions - makers - {"grouped"}
    assert {name.partition(",")[0] for name in tasks.GROUPED} == set(brandla.grouped.__all__)


@pytest.mark.parametrize("name", tasks.GROUPED)
def test_a_group_is_as_right_as_its_members(name):
    group = tasks.group_of(name, [SHAPE, SHAPE._replace(n=64)], Stub())
    tasks.check(tasks.ONE_BY_ONE, group.call(tasks.ONE_BY_ONE))
    tasks.check(BRANDLA, group.call(BRANDLA))
    assert_refused(group.call(BRANDLA), spoiled)


@pytest.mark.parametrize("name", LOSS_ALLOWED)
def test_updates_are_checked_where_a_stream_settles(name):
    judged = tasks.check(name, TASKS[name].task(Shape(256, 64, 32), Stub()).call(BRANDLA))
    # With half as many columns as the rank, one step without eigendecomposition leaves out 7 to 9 % more than the best.
    assert judged.used * LOSS_ALLOWED[name] < 1.01


def test_lobpcg_is_right_in_float32():
    call = TASKS["randomized_eigh"].task(Shape(512, 32, 32), Stub()).call("torch.lobpcg")
    # With LOBPCG's default of 1,000 iterations, this start ends more than 20,000 ε off orthonormal.
    torch.manual_seed(3)
    tasks.check("torch.lobpcg", call)


def test_a_run_names_the_peers_that_fail_and_ctrl_c_keeps_the_cases_that_ended(tmp_path):
    (tmp_path / "spoiling.py").write_text(PLUGIN, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "bench/benches/bench_functions.py", "-p", "spoiling"]
    command += ["--quick", "--benchmark-only", "-p", "no:cacheprovider"]
    # With this variable, pytest-benchmark would take the run for a worker of xdist, and time nothing.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    inherited["PYTHONPATH"] = os.pathsep.join([str(tmp_path), "kernels", os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stdout
    (result,) = tmp_path.glob("*/functions.json")
    assert f"written: {result.relative_to(tmp_path)}, interrupted: " in done.stdout
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["facts"]["interrupted"]
    refused = {row["by"]: row["reason"] for row in found["refused"]}
    assert set(refused) == {"torch.lobpcg", "torch.linalg.eigh"}
    assert refused["torch.lobpcg"] == "RuntimeError: did not converge/in time"
    assert refused["torch.linalg.eigh"].startswith("WrongResultError: torch.linalg.eigh, randomized_eigh")
    threads = {row["by"]: row["blas_threads"] for row in found["rows"] if row["function"] == "randomized_eigh"}
    # Peers on NumPy report their number of threads, which is one in a short run.
    assert threads == {by: 1 if by in peers.SYMMETRIC and peers.SYMMETRIC[by].on_numpy else None for by in threads}
    assert {"brandla", "scipy eigsh", "scikit-learn randomized_svd"} <= set(threads)


def test_a_wrong_result_of_ours_fails_and_a_peers_is_skipped():
    study = Study()
    for by, outcome in ((BRANDLA, WrongResultError), ("torch.lobpcg", pytest.skip.Exception)):
        with pytest.raises(outcome, match="off"), tolerated(study, {"by": by}):
            raise WrongResultError("off")
    assert [row["by"] for row in study.refused] == ["torch.lobpcg"]


def test_make_bench_runs_the_files_whose_peers_it_installs():
    # The options of an outer make must not reach this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "bench"]
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert sorted(re.findall(r"bench/benches/bench_(\w+)\.py", output)) == ["functions", "updates"]
