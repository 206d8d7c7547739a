"""``make study-accuracy``: its measures equal their definitions, written out at small sizes."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import brandla
from bench.studies.accuracy import QUICK, Decomposed, TrackedFactor, Tracker, observations, step_errors, trackers
from builders import make_columns

TINY = replace(QUICK, widths=(96,), steps=8, measure_every=2, warmup=3, batch=24, rank=6)
columns = partial(make_columns, dtype=torch.float32)
COSTS = {"average": 3.0, "brand": 4.0, "root": 2.5, "cholesky": 3.0, "svd": 26.0, "eigh": 14.0, "correction": 1.5}


def test_periods_cost_no_more_than_b_r_and_no_shorter_one_would_do():
    found = {one.name: one for one in trackers(QUICK, COSTS)}
    spent = found["B-R"].cost(COSTS)
    assert spent == pytest.approx(3.0 + 4.0 + 26.0 / QUICK.overwrite_every)
    for name in ("B-C", "RS", "SRE"):
        one = found[name]
        assert one.cost(COSTS) <= spent
        assert one.period == 1 or replace(one, period=one.period - 1).cost(COSTS) > spent
    assert found["B"].cost(COSTS) == 4.0


def test_the_columns_are_those_of_the_weights_gradient():
    """∂W of the mean loss over k samples is G Aᵀ, where the columns of G and A are divided by √k."""
    factors, gradient = next(observations(TINY, 96, 0))
    a, g = factors["inputs"], factors["gradients"]
    assert (a.shape, g.shape) == ((97, 24), (96, 24))
    torch.testing.assert_close(a[-1], torch.full((24,), 24**-0.5))
    torch.testing.assert_close(gradient, g @ a.mT)


def inverse_of(matrix, damping):
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=torch.float64))


def test_errors_are_those_of_their_definitions():
    settings, exact, factors = replace(TINY, rank=4), {}, {}
    for side, n in (("gradients", 20), ("inputs", 25)):
        batches = [columns(n, 8, seed=seed) for seed in range(3)]
        matrix = sum(batch.double() @ batch.double().mT for batch in batches)
        own = exact[side] = Decomposed(matrix, settings)
        factor = factors[side] = brandla.eigh_update(brandla.LowRankEigh.zeros(n, 4), batches[2])
        held, basis, values = factor.dense().double(), factor.eigenvectors.double(), torch.linalg.eigvalsh(matrix)
        damping = settings.damping * values[-1]
        right = inverse_of(matrix, damping)
        expected = {
            "inverse": (inverse_of(held, damping) - right).norm() / right.norm(),
            "spectral": torch.linalg.matrix_norm(held - matrix, 2) / values[-1],
            "trace": 1 - torch.trace(basis.mT @ matrix @ basis) / torch.trace(matrix),
        }
        # The factor is float32, and its vectors are orthonormal to the rounding of float32.
        assert own.errors(factor) == pytest.approx({name: float(one) for name, one in expected.items()}, rel=1e-5)
        assert own.errors(own.best(4))["spectral"] == pytest.approx(float(values[-5] / values[-1]), rel=1e-5)
    # The step is compared with the step of the true factors. acos loses half of the digits at 1.
    gradient, whole = columns(20, 25, seed=1), {side: one.best(len(one.values)) for side, one in exact.items()}
    assert step_errors(gradient, exact, whole) == pytest.approx({"step error": 0, "step angle": 0}, abs=1e-5)
    g, a = (inverse_of(factors[side].dense().double(), one.damping) for side, one in exact.items())
    taken, right = g @ gradient.double() @ a, exact["gradients"].inverse @ gradient.double() @ exact["inputs"].inverse
    angle = torch.rad2deg(torch.acos((taken * right).sum() / (taken.norm() * right.norm())))
    expected = {"step error": float((taken - right).norm() / right.norm()), "step angle": float(angle)}
    assert step_errors(gradient, exact, factors) == pytest.approx(expected, rel=1e-5)


def test_trackers_do_what_their_names_say():
    settings = replace(TINY, overwrite_every=2)
    about = ("B", "brand", None, 0), ("B-R", "brand", "svd", 2), ("RS", None, "svd", 2), ("SRE", None, "eigh", 3)
    chosen = [Tracker(*one) for one in about]
    assert [step for step in range(1, 8) if chosen[3].due(step)] == [1, 4, 7]
    kept, batches = TrackedFactor(settings, 40, 0, chosen), [columns(40, 3, seed=seed) for seed in range(2)]
    kept.absorb(1, batches[0])
    first = dict(kept.factors)
    kept.absorb(2, batches[1])
    assert kept.factors["RS"] is first["RS"]
    assert kept.factors["SRE"] is first["SRE"]
    weight = 1 - settings.decay
    exact = weight * (settings.decay * batches[0] @ batches[0].mT + batches[1] @ batches[1].mT)
    # Rank 6 holds both batches of 3 columns: a few ε‖M‖ are left.
    for name in ("B", "B-R"):
        torch.testing.assert_close(kept.factors[name].dense(), exact, rtol=0, atol=2e-6 * float(exact.norm()))
