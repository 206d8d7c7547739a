"""Several processes together with the curvature of the loss, loss scaling and accumulation: as one process has them."""

from __future__ import annotations

import pytest
import torch

from brandla.kfac import EKFAC, Brand, ConjugateGradient, Exact, Randomized, TwoLevel
from brandla.kfac.systems.inverse_free import InverseFree
from distributed import replicas
from distributed.processes import run
from distributed.replicas import Branches, Case, Mixed, alone, error_of

SCALE = 2.0**30
EXACT = {"curvature": "type-2"}
DRAWN = {"curvature": "monte-carlo"}
# Nothing hides the size of G: the step is as long as the solve makes it.
UNCLIPPED = {"curvature": "type-2", "clip": None, "damping": 1.0}
SINGD = InverseFree(preconditioner_every=2)
# Eigenvectors of directions without data are what rounding makes them: EKFAC is only determined with those of now.
CORRECTED = EKFAC(inverse_every=1)
OF_TWO = {
    "type-2": {"strategy": Brand(6), "sizes": (1, 1), "options": EXACT},
    "type-2, uneven": {"strategy": Brand(6), "sizes": (2, 1), "options": EXACT},
    "type-2, no clipping": {"strategy": Exact(inverse_every=1), "sizes": (4, 2), "options": UNCLIPPED},
    "type-2, randomized": {"strategy": Randomized(6, inverse_every=2), "options": EXACT},
    "type-2, SINGD": {"strategy": SINGD, "options": EXACT},
    "type-2, accumulated": {"strategy": Exact(inverse_every=2), "sizes": (4, 2), "accumulate": 3, "options": EXACT},
    "type-2, CG": {"strategy": ConjugateGradient(), "sizes": (2, 3), "accumulate": 2, "options": EXACT},
    "type-2, two-level": {"strategy": TwoLevel(Brand(6)), "sizes": (3, 2), "accumulate": 2, "options": EXACT},
    "type-2, mixed layers": {"strategy": CORRECTED, "sizes": (4, 2), "options": EXACT, "model": Mixed},
    "type-2, two-level, mixed layers": {
        "strategy": TwoLevel(Exact(inverse_every=1)),
        "sizes": (4, 2),
        "options": EXACT,
        "model": Mixed,
    },
    "type-2, layers unused on a rank": {
        "strategy": Exact(inverse_every=1),
        "sizes": (4, 2),
        "accumulate": 2,
        "options": UNCLIPPED,
        "model": Branches,
    },
    "type-2, static graph": {"strategy": Brand(6), "sizes": (1, 1), "options": EXACT, "wrap": "static"},
    "drawn": {"strategy": Exact(inverse_every=2), "options": DRAWN},
    "drawn, accumulated": {"strategy": Brand(6), "sizes": (2, 1), "accumulate": 3, "options": DRAWN},
    "drawn, mixed layers": {"strategy": CORRECTED, "sizes": (4, 3), "options": DRAWN, "model": Mixed},
    "scaled": {"strategy": Brand(6), "scale": SCALE},
    "scaled, accumulated, too large": {
        "strategy": Brand(6),
        "sizes": (3, 2),
        "accumulate": 3,
        "scale": SCALE,
        "overflows": ((0, 0), (1, 3)),
    },
    "scaled, CG, too large": {"strategy": ConjugateGradient(), "scale": SCALE, "overflows": ((1, 0), (0, 2))},
    "all": {
        "strategy": SINGD,
        "sizes": (3, 2),
        "accumulate": 2,
        "options": EXACT,
        "scale": SCALE,
        "overflows": ((1, 0), (1, 3)),
    },
    "all, drawn": {
        "strategy": CORRECTED,
        "sizes": (3, 2),
        "accumulate": 2,
        "options": DRAWN,
        "scale": SCALE,
        "overflows": ((0, 2),),
    },
}
OF_FOUR = {
    "type-2": {"strategy": Brand(6), "sizes": (1, 1, 1, 1), "options": EXACT},
    "drawn": {"strategy": Exact(inverse_every=2), "sizes": (2, 1, 3, 2), "accumulate": 2, "options": DRAWN},
    "all": {
        "strategy": SINGD,
        "sizes": (1, 3, 2, 1),
        "accumulate": 2,
        "options": EXACT,
        "scale": SCALE,
        "overflows": ((2, 0), (3, 3)),
    },
}


@pytest.mark.parametrize("ways", [OF_TWO, OF_FOUR], ids=["2", "4"])
def test_combinations_equal_one_process(ways: dict[str, dict[str, object]]):
    """To rounding, and bit by bit in all processes; from a checkpoint too.

    Solves of condition 11 a side lose 11² · 31 ε = 8e-13 of a step, and a step hands on what came before times a few.
    """
    cases = {f"{name}, {mode}": Case(mode=mode, **way) for name, way in ways.items() for mode in ("gather", "split")}
    ranks = 2 if ways is OF_TWO else 4
    by_rank = run(replicas.train, ranks, list(cases.values()), timeout=120)
    for (name, case), *outcomes in zip(cases.items(), *by_rank, strict=True):
        assert error_of(outcomes[0].parameters, alone(case)) < 1e-9, name
        for outcome in outcomes:
            assert outcome.same, f"{name}: parameters"
            assert outcome.states_same, f"{name}: states"
            assert outcome.continued_same, f"{name}: continued from a checkpoint"
            assert outcome.skipped == len(case.overflows), name
            assert outcome.scale == (case.scale or 1.0) / 2 ** len(case.overflows), name


@pytest.mark.parametrize("options", [EXACT, DRAWN], ids=["type-2", "drawn"])
def test_one_process_continues_from_a_checkpoint_of_two(options: dict[str, object]):
    case = Case(SINGD, "split", (3, 2), 2, options, scale=SCALE, overflows=((1, 0),))
    state, expected = run(replicas.checkpoint, 2, case)[0]
    training = replicas.Training(case, replicas.network())
    training.resume(state)
    training.step_alone(replicas.STEPS)
    assert error_of(training.parameters(), expected) < 1e-9


def test_groups_train_by_themselves():
    cases = [
        Case(Exact(inverse_every=2), "gather", (3, 2), 2, EXACT),
        Case(SINGD, "split", (2, 1), 2, DRAWN, scale=SCALE, overflows=((1, 2),)),
    ]
    firsts = (0, 100)
    for rank, trained in enumerate(run(replicas.train_in_pairs, 4, cases, firsts)):
        for case, parameters in zip(cases, trained, strict=True):
            assert error_of(parameters, alone(case, firsts[rank // 2])) < 1e-9


def test_processes_and_calls_draw_noise_of_their_own():
    """The cosine of two independent vectors of 1000 normal numbers has deviation 1/√1000: none of 276 is 6 off."""
    noise = torch.cat(run(replicas.draws, 4, 3, 2))
    assert noise.shape == (24, 1000)
    unit = noise / torch.linalg.vector_norm(noise, dim=1, keepdim=True)
    cosines = unit @ unit.T - torch.eye(len(unit))
    assert cosines.abs().max() < 6 / 1000**0.5
