"""K-FAC in several processes: the same as one process with all batches, and the same in every process bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from brandla.kfac import (
    EKFAC,
    KFAC,
    Brand,
    BrandCorrected,
    BrandRandomized,
    ConjugateGradient,
    Exact,
    Foof,
    Randomized,
    TwoLevel,
)
from brandla.kfac.processes.exchange import fewer
from brandla.kfac.systems.inverse_free import InverseFree
from distributed import replicas
from distributed.processes import launch, run
from distributed.replicas import Branches, Case, Mixed, alone, error_of

STRATEGIES = {
    "exact": Exact(inverse_every=2),
    "randomized": Randomized(6, inverse_every=2),
    "randomized-svd": Randomized(6, method="svd", inverse_every=1),
    "brand": Brand(6),
    "brand-cholesky": Brand(6, compress="cholesky"),
    "brand-eigh": Brand(6, form="eigh"),
    "brand-randomized": BrandRandomized(6, overwrite_every=2),
    "brand-corrected": BrandCorrected(6, correct_every=2),
}
OTHERS = {
    "ekfac": EKFAC(inverse_every=2),
    "foof": Foof(Brand(6)),
    "conjugate-gradient": ConjugateGradient(),
    "inverse-free": InverseFree(preconditioner_every=2),
    "two-level": TwoLevel(Brand(6)),
}
MIXED = {"exact": Exact(inverse_every=1), "two-level": TwoLevel(Exact()), "inverse-free": OTHERS["inverse-free"]}
PRACTICE = {
    "uneven": {"sizes": (9, 3)},
    "plain model": {"wrap": "plain"},
    "accumulated": {"accumulate": 3, "sizes": (3, 2)},
    "now and then": {"options": {"factor_every": 2, "damping": replicas.falling}},
    "clipped by KL": {"options": {"clip_by": "kl", "clip": 1e-2}},
    "layers unused on a rank": {"model": Branches},
    "broken on one rank": {"broken": (1, 2)},
}


def cases_of_two() -> dict[str, Case]:
    systems = STRATEGIES | OTHERS
    cases = {f"{name}, {mode}": Case(systems[name], mode) for name in systems for mode in ("gather", "split")}
    for mode in ("gather", "split"):
        for name in ("exact", "two-level", "inverse-free"):
            cases[f"mixed layers, {name}, {mode}"] = Case(MIXED[name], mode, (4, 2), model=Mixed)
    for name, changes in PRACTICE.items():
        for mode in ("gather", "split"):
            cases[f"{name}, {mode}"] = Case(Brand(6), mode)._replace(**changes)
    return cases


def cases_of_four() -> dict[str, Case]:
    cases = {}
    for mode in ("gather", "split"):
        for name in ("exact", "randomized", "brand", "brand-cholesky", "ekfac"):
            cases[f"{name}, {mode}"] = Case((STRATEGIES | OTHERS)[name], mode, (3, 3, 3, 3))
        cases[f"uneven, {mode}"] = Case(Brand(6), mode, (1, 5, 2, 4))
    return cases


def results(ranks: int, cases: dict[str, Case]) -> dict[str, list[replicas.Outcome]]:
    by_rank = run(replicas.train, ranks, list(cases.values()), timeout=120)
    return dict(zip(cases, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.fixture(scope="module")
def trained() -> dict[str, list[replicas.Outcome]]:
    """What came of all cases, in as few launches as there are numbers of ranks."""
    two = results(2, cases_of_two())
    return {f"2: {name}": outcomes for name, outcomes in two.items()} | {
        f"4: {name}": outcomes for name, outcomes in results(4, cases_of_four()).items()
    }


CASES = {f"2: {name}": case for name, case in cases_of_two().items()} | {
    f"4: {name}": case for name, case in cases_of_four().items()
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_with_all_batches(trained: dict[str, list[replicas.Outcome]], name: str):
    """To rounding: five steps, each with damped inverses of condition 10 a side, far from losing seven digits."""
    assert error_of(trained[name][0].parameters, alone(CASES[name])) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_all_processes_are_bit_equal(trained: dict[str, list[replicas.Outcome]], name: str):
    for outcome in trained[name]:
        assert outcome.same, "parameters"
        assert outcome.states_same, "states"
        assert outcome.continued_same, "continued from a checkpoint"


@pytest.mark.parametrize("mode", ["gather", "split"])
def test_a_batch_that_is_broken_on_one_rank_is_skipped_by_all(trained: dict[str, list[replicas.Outcome]], mode: str):
    assert [outcome.skipped for outcome in trained[f"2: broken on one rank, {mode}"]] == [1, 1]


@pytest.mark.parametrize("mode", ["gather", "split"])
@pytest.mark.filterwarnings("ignore:KFAC")
def test_one_process_continues_from_a_checkpoint_of_two(mode: str):
    state, expected = run(replicas.checkpoint, 2, Case(Brand(6), mode))[0]
    training = replicas.Training(Case(Brand(6)), replicas.network())
    training.resume(state)
    training.step_alone(replicas.STEPS)
    assert error_of(training.parameters(), expected) < 1e-9


def test_sharded_parameters_equal_one_process():
    exact = {"curvature": "type-2"}
    cases = [
        Case(Exact(inverse_every=2)),
        Case(Brand(6), "split", (9, 3)),
        Case(Exact(inverse_every=1), "gather", (3, 2), 3, exact),
        Case(InverseFree(preconditioner_every=2), "split", (3, 2), 2, exact, scale=2.0**30, overflows=((0, 0), (1, 3))),
    ]
    for before in (False, True):
        for outcomes in run(_sharded, 2, cases, before):
            for case, parameters in zip(cases, outcomes, strict=True):
                assert error_of(parameters, alone(case)) < 1e-9


def _sharded(cases: list[Case], before: bool) -> Any:
    return replicas.train_sharded(cases, before=before)


def test_fewer_rows_have_nearly_the_same_sum_of_outer_products():
    """The best of rank 6 leaves σ₇² in the 2-norm; a randomized one is within a few percent of it here."""
    torch.manual_seed(0)
    rows = torch.randn(40, 20, dtype=torch.float64) @ torch.diag(0.5 ** torch.arange(20, dtype=torch.float64))
    few = fewer(rows, 6, seed=1)
    difference = rows.mT @ rows - few.mT @ few
    best = torch.linalg.svdvals(rows)[6] ** 2
    assert few.shape == (6, 20)
    assert torch.linalg.eigvalsh(difference)[-1] < 1.1 * best
    # Never more than all: the difference is semi-definite, to rounding.
    assert torch.linalg.eigvalsh(difference)[0] > -1e-13 * torch.linalg.matrix_norm(rows, 2) ** 2
    assert torch.equal(few, fewer(rows, 6, seed=1))


@pytest.mark.parametrize("options", [{}, {"columns": 10}], ids=["brand", "bound"])
@pytest.mark.parametrize("mode", ["gather", "split"])
def test_batches_of_the_same_samples_lose_nothing_in_fewer_columns(mode: str, options: dict[str, int]):
    """Four ranks with one batch of 8 have 32 columns of rank 8: the mean of one batch, of which 10 hold all."""
    strategies, reference = replicas.train_alike(None, {})
    for kept, parameters in run(replicas.train_alike, 4, mode, options):
        assert kept == strategies == ["Brand", "Brand"]
        assert error_of(parameters, reference) < 1e-9


@pytest.mark.parametrize("mode", ["gather", "split"])
def test_a_layer_that_one_rank_cannot_precondition_is_left_by_all(mode: str):
    for left, untouched, same in run(replicas.last_rank_refuses, 2, mode):
        assert left == [False, True, False]
        assert untouched
        assert same


@pytest.mark.parametrize("processes", [1, 2])
def test_gradients_that_are_reduced_must_be_formed(processes: int):
    told = ["a model in DistributedDataParallel", "several processes"][:processes]
    rule = "KFAC: gradient must be 'autograd' where gradients are reduced over processes; got"
    assert run(replicas.leaves_gradients_out, processes) == [[f"{rule} {got}" for got in told]] * processes


@pytest.mark.parametrize("mode", ["gather", "split"])
def test_a_rank_that_has_nothing_takes_part(mode: str):
    (first, same), (second, also_same) = run(replicas.first_rank_brings_all, 2, mode)
    assert all(first)
    assert not any(second)
    assert same
    assert also_same


@pytest.mark.parametrize("mode", ["gather", "split"])
def test_death_of_a_rank_is_an_error_of_the_others(mode: str):
    *others, last = launch(replicas.last_rank_leaves, 3, mode, group_timeout=10.0, timeout=40.0)
    assert last.failure == "died with exit code 3"
    assert all(other.failure is None and other.result for other in others)


def test_a_rank_that_never_comes_is_an_error_after_the_timeout():
    first, last = launch(replicas.last_rank_is_late, 2, 4.0, group_timeout=1.0, timeout=40.0)
    assert last.failure is None
    assert "imed out" in first.result


def test_torchrun():
    """A program as users start it, on the loopback interface and at a free port."""
    program = Path(__file__).with_name("program.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(program)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    # The two write to one pipe, also at the same moment.
    assert done.stdout.count("equal") == 2, done.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [({"distributed": "ring"}, "distributed must be 'gather' or 'split'"), ({"columns": 0}, "columns must be")],
    ids=["mode", "columns"],
)
def test_options_are_checked(option: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        KFAC(torch.nn.Linear(3, 2), **option)
