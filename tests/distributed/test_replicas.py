"""K-FAC in several processes equals one process with all batches, and is the same in every process bit by bit."""

import multiprocessing
import operator
import time

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from brandla.kfac import EKFAC, KBFGS, Brand, ConjugateGradient, Exact, InverseFree, TwoLevel, Woodbury
from brandla.kfac.processes.exchange import compressed
from distributed import replicas
from distributed.processes import run
from distributed.replicas import Branches, Case, Mixed, Training, alone, error_of
from kfac.systems import SYSTEMS

# In some cases a process warns, since it has few samples.
pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

EXACT, DRAWN = {"curvature": "type-2"}, {"curvature": "monte-carlo"}
# Without a clip, the length of the step shows the size of G.
FREE = {"clip": None, "damping": 1.0}
UNCLIPPED = {**EXACT, **FREE}
SINGD = InverseFree(preconditioner_every=2)
# Rounding decides the eigenvectors in directions without data, so EKFAC is only determined if it renews them each step.
CORRECTED = EKFAC(inverse_every=1)
BOTH = ("gather", "split")
SCALED = {"scale": 2.0**30, "overflows": ((1, 0), (0, 1))}


def ways(strategy, *modes, **changes):
    """Return a case for each mode. Tests give both modes only if more differs than which process computes what."""
    return {mode: Case(strategy, mode, **changes) for mode in modes}


# With sampled features, the step depends on whether the gradient is the pair.
SAME_STEPS = {name: strategy for name, strategy in SYSTEMS.items() if name != "seng"}
# Every system in one of the modes.
OF_TWO = {name: ways(strategy, BOTH[index % 2]) for index, (name, strategy) in enumerate(SAME_STEPS.items())} | {
    "seng, two-sided": ways(SYSTEMS["seng"], "split", options={"application": "two-sided"}),
    "mixed layers, exact": ways(Exact(inverse_every=1), "gather", sizes=(4, 2), model=Mixed),
    "mixed layers, two-level": ways(TwoLevel(Exact()), "gather", sizes=(4, 2), model=Mixed),
    "mixed layers, inverse-free": ways(SINGD, "split", sizes=(4, 2), model=Mixed),
    "mixed layers, woodbury": ways(Woodbury(), *BOTH, sizes=(4, 2), model=Mixed),
    "k-bfgs, uneven": ways(KBFGS(), "gather", sizes=(4, 2)),
    "mixed layers, k-bfgs": ways(KBFGS(), "split", model=Mixed),
    "uneven": ways(Brand(6), *BOTH, sizes=(9, 3)),
    "plain model": ways(Brand(6), "split", wrap="plain"),
    "accumulated": ways(Brand(6), "gather", sizes=(3, 2), accumulate=3),
    "now and then": ways(Brand(6), "split", options={"factor_every": 2, "damping": replicas.falling}),
    "clipped by spectral norm": ways(Brand(6), "gather", options={"clip_by": "spectral", "clip": 1e-2}),
    "clipped by KL": ways(Brand(6), "gather", options={"clip_by": "kl", "clip": 1e-2}),
    "layers unused on a rank": ways(Brand(6), *BOTH, model=Branches),
    "broken on one rank": ways(Brand(6), *BOTH, broken=(1, 1)),
    "counted": ways(Exact(inverse_every=1), *BOTH, sizes=(4, 2), accumulate=2, options=FREE, model=Mixed, counted=True),
    "counted, layers unused": ways(Woodbury(), "gather", sizes=(4, 2), options=FREE, model=Branches, counted=True),
    "type-2, no clipping": ways(Exact(inverse_every=1), "split", sizes=(4, 2), options=UNCLIPPED),
    "type-2, CG": ways(ConjugateGradient(), "gather", sizes=(2, 3), accumulate=2, options=EXACT),
    "type-2, two-level": ways(TwoLevel(Exact(inverse_every=1)), "split", sizes=(4, 2), options=EXACT, model=Mixed),
    "type-2, layers unused": ways(
        Exact(inverse_every=1), "gather", sizes=(4, 2), accumulate=2, options=UNCLIPPED, model=Branches
    ),
    "type-2, static graph": ways(Brand(6), "split", sizes=(1, 1), options=EXACT, wrap="static"),
    "drawn, accumulated": ways(Brand(6), "gather", sizes=(2, 1), accumulate=3, options=DRAWN),
    "drawn, mixed layers": ways(CORRECTED, "split", sizes=(4, 3), options=DRAWN, model=Mixed),
    "all": ways(SINGD, *BOTH, sizes=(3, 2), accumulate=2, options=EXACT, **SCALED),
    "drawn, all": ways(SINGD, "split", sizes=(3, 2), accumulate=2, options=DRAWN, **SCALED),
    "sharded": ways(Brand(6), "split", sizes=(9, 3), wrap="fsdp"),
    "sharded, accumulated": ways(
        Exact(inverse_every=1), "gather", sizes=(3, 2), accumulate=3, options=EXACT, wrap="fsdp"
    ),
    "sharded later": ways(Exact(inverse_every=2), "gather", wrap="fsdp later"),
    "all, sharded later": ways(SINGD, "split", sizes=(3, 2), accumulate=2, options=EXACT, wrap="fsdp later", **SCALED),
}
OF_FOUR = {
    "exact": ways(Exact(inverse_every=2), "split", sizes=(3, 3, 3, 3)),
    "ekfac": ways(EKFAC(inverse_every=2), "gather", sizes=(3, 3, 3, 3)),
    "uneven": ways(Brand(6), *BOTH, sizes=(1, 5, 2, 4)),
    "drawn": ways(Exact(inverse_every=2), "gather", sizes=(2, 1, 3, 2), accumulate=2, options=DRAWN),
    "all": ways(SINGD, "split", sizes=(1, 3, 2, 1), accumulate=2, options=EXACT, **SCALED),
}


@pytest.mark.parametrize(("ranks", "named"), [(2, OF_TWO), (4, OF_FOUR)], ids=["2", "4"])
def test_equals_one_process_with_all_batches(ranks, named):
    """Up to rounding, and bit by bit in all processes, also from a checkpoint, which one process can load too.

    Solves of condition 11 a side lose 11² · 31 ε = 8e-13 of a step, and a step multiplies earlier errors a few times.
    """
    cases = {f"{name}, {mode}": case for name, modes in named.items() for mode, case in modes.items()}
    first, *_ = run(replicas.train, ranks, cases, timeout=120)
    for (name, case), (parameters, state) in zip(cases.items(), first, strict=True):
        assert error_of(parameters, alone(case)) < 1e-9, name
        one = Training(case, case.model())
        one.resume(state)
        one.step(replicas.STEPS - 1, alone=True)
        assert error_of(one.parameters(), parameters) < 1e-9, name


def test_groups_train_by_themselves():
    cases = [
        Case(Exact(inverse_every=2), "gather", (3, 2), 2, EXACT),
        Case(SINGD, "split", (2, 1), 2, DRAWN, scale=2.0**30, overflows=((1, 2),)),
    ]
    firsts = (0, 100)
    for rank, trained in enumerate(run(replicas.train_in_pairs, 4, cases, firsts)):
        for case, parameters in zip(cases, trained, strict=True):
            assert error_of(parameters, alone(case, firsts[rank // 2])) < 1e-9


def test_processes_and_calls_draw_independent_noise():
    """The cosine of two independent vectors of 1000 normal numbers has deviation 1/√1000: none of 276 is 6 off."""
    noise = torch.cat(run(replicas.draws, 4, 3, 2))
    assert noise.shape == (24, 1000)
    unit = noise / torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    cosines = unit @ unit.T - torch.eye(len(unit))
    assert cosines.abs().max() < 6 / 1000**0.5


def test_fewer_rows_have_nearly_the_same_sum_of_outer_products():
    """The best of rank 6 leaves σ₇² in the 2-norm; a randomized one is within a few percent of it here."""
    torch.manual_seed(0)
    rows = torch.randn(40, 20, dtype=torch.float64) @ torch.diag(0.5 ** torch.arange(20, dtype=torch.float64))
    few = compressed(rows, 6, seed=1)
    difference = rows.mT @ rows - few.mT @ few
    best = torch.linalg.svdvals(rows)[6] ** 2
    assert few.shape == (6, 20)
    assert torch.linalg.eigvalsh(difference)[-1] < 1.1 * best
    # The difference is semi-definite, up to rounding.
    assert torch.linalg.eigvalsh(difference)[0] > -1e-13 * torch.linalg.matrix_norm(rows, 2) ** 2
    assert torch.equal(few, compressed(rows, 6, seed=1))


def test_batches_of_the_same_samples_lose_nothing_in_fewer_columns():
    """Four ranks with the same batch of 8 have 32 columns of rank 8, and 10 columns hold all of their mean."""
    strategies, reference = replicas.train_alike(None, {})
    ways = [(mode, options) for mode in BOTH for options in ({}, {"columns": 10})]
    for results in run(replicas.in_turn, 4, [(replicas.train_alike, way) for way in ways]):
        for kept, parameters in results:
            assert kept == strategies == ["Brand", "Brand"]
            assert error_of(parameters, reference) < 1e-9


@pytest.mark.parametrize("check", [replicas.last_rank_refuses, replicas.first_rank_brings_all])
def test_a_refusal_or_a_gradient_of_one_rank_is_the_same_for_all(check):
    run(replicas.in_turn, 2, [(check, (mode,)) for mode in BOTH])


@pytest.mark.parametrize("processes", [1, 2])
def test_gradients_that_are_reduced_must_be_formed(processes):
    rule = "Error: KFAC: gradient must be 'autograd' where gradients are reduced over processes; got"
    errors = [f"Value{rule} a model in DistributedDataParallel", f"Runtime{rule} several processes"][:processes]
    assert run(replicas.leaves_gradients_out, processes) == [errors] * processes


@pytest.mark.parametrize("mode", BOTH)
def test_death_of_a_rank_is_an_error_of_the_others(mode):
    *others, last = run(replicas.last_rank_is_missing, 3, mode, None, group_timeout=10.0, timeout=40.0)
    assert last is None
    assert all(others)


def test_a_rank_that_never_comes_is_an_error_after_the_timeout():
    assert "imed out" in run(replicas.last_rank_is_missing, 2, "gather", 2.5, group_timeout=1.0, timeout=40.0)[0]


def test_errors_and_timeouts_of_ranks_are_reported():
    with pytest.raises(ProcessRaisedException, match=r"Traceback(.|\n)*ZeroDivisionError"):
        run(operator.truediv, 2, 1, 0)
    # The fork server runs by now, so this measures the time of the ranks alone.
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="still running at the time limit"):
        run(time.sleep, 2, 600, timeout=1)
    # The limit, plus a few seconds for a busy machine to kill two processes.
    assert time.monotonic() - start < 11
    assert not multiprocessing.active_children()
