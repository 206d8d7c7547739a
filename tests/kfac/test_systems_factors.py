"""Systems of Kronecker factors: the dense step, mean tails, sketches, Cholesky's failures, FOOF."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import brandla
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Foof, Randomized, Strategy
from brandla.kfac.systems.brand import sketch_width
from brandla.kfac.systems.factor import damped_solves
from brandla.kfac.systems.kronecker import FactorStrategy
from brandla.kfac.values import Damping
from builders import dense_operator
from kfac.networks import batch, damped_inverse, gradients, layer_step, loss_of, mlp, stepped
from kfac.systems import assert_near, factors_of, full_rank, some_systems

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

DAMPING = 0.03
FULL_RANK = full_rank(24)


def estimates(strategy: Strategy) -> bool:
    """Whether d₁ is estimated, from below, and with it the damping."""
    return "cholesky" in (getattr(strategy, "compress", ""), getattr(strategy, "method", ""))


@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("foof", [False, True], ids=["both", "foof"])
@pytest.mark.parametrize("strategy", FULL_RANK.values(), ids=FULL_RANK)
def test_one_batch_equals_the_dense_formula(strategy: FactorStrategy, application: str, foof: bool):
    """(G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹; FOOF leaves out the first."""
    layer = mlp(60, 50)[0]
    system = Foof(strategy) if foof else strategy
    preconditioner = KFAC(layer, system, damping=DAMPING, clip=None, application=application)
    step = layer_step(layer, preconditioner, batch(8, 60, 50))
    averages = dict(zip(("input", "output"), step.factors, strict=True))
    inverses = {}
    for side, factor in preconditioner._layers[0].curvature.factors():
        true, found = torch.linalg.eigvalsh(averages[side])[-1], factor.largest()
        assert (0.8 if estimates(strategy) else 1 - 1e-12) <= found / true <= 1 + 1e-12
        inverses[side] = damped_inverse(averages[side], DAMPING, found)
    left = torch.eye(50, dtype=torch.float64) if foof else inverses["output"]
    assert_near(step.result, left @ step.gradient @ inverses["input"], 1e-9)


@pytest.mark.parametrize("name", [name for name in FULL_RANK if name.startswith("brand")])
def test_brand_equals_exact_while_its_rank_holds_all_data(name: str):
    """Three batches of 8 have rank 24: nothing is truncated."""
    steps = []
    for strategy in (FULL_RANK["exact"], FULL_RANK[name]):
        layer = mlp(60, 50)[0]
        preconditioner = KFAC(layer, strategy, damping=DAMPING, clip=None)
        for seed in range(3):
            step = layer_step(layer, preconditioner, batch(8, 60, 50, seed))
        steps.append(step.result)
    assert_near(steps[1], steps[0], 2e-2 if estimates(strategy) else 1e-8)


class Trained(NamedTuple):
    """The preconditioner of a layer, its input factor, and the dense average of the same batches."""

    preconditioner: KFAC
    factor: Tensor
    average: Tensor


def trained(strategy: Strategy, steps: int, *, count: int = 8, decay: float = 0.95) -> Trained:
    """Train a layer whose inputs have a spectrum that falls by i⁻¹."""
    layer = mlp(60, 50, bias=False)[0]
    preconditioner = KFAC(layer, strategy, damping=DAMPING, clip=None, decay=decay)
    dense, total = torch.zeros(60, 60, dtype=torch.float64), 0.0
    for seed in range(steps):
        inputs, labels = batch(count, 60, 50, seed)
        step = layer_step(layer, preconditioner, (inputs / torch.arange(1.0, 61), labels))
        dense, total = decay * dense + step.factors[0], decay * total + 1
    factor = preconditioner._layers[0].curvature.input
    lowrank = factor.strategy.lowrank(factor.state)
    return Trained(preconditioner, lowrank.dense(), dense / total)


TRUNCATED = {name: own for name, own in full_rank(16).items() if name == "exact" or name.startswith("brand")}
TRUNCATED["randomized"] = Randomized(16, inverse_every=1)


@pytest.mark.parametrize("tail", ["mean", "smallest", 0.5])
@pytest.mark.parametrize("strategy", TRUNCATED.values(), ids=TRUNCATED)
def test_tail_is_what_unseen_directions_are_taken_for(strategy: FactorStrategy, tail: float | str):
    """τ = (tr M − tr M̂)/(n − r) for "mean", by dense inverses; in a root every value under τ counts as τ."""
    strategy = replace(strategy, tail=tail)
    preconditioner, _, dense = trained(Foof(strategy), 6)
    (factor,) = factors_of(preconditioner)
    kept = strategy.lowrank(factor.state)
    assert kept.rank == 60 or (dense - kept.dense()).trace() > 1e-4 * DAMPING * (60 - kept.rank)
    damped = dense_operator(brandla.Tracked(kept, dense.trace(), dense.trace()), DAMPING, tail)
    block = torch.randn(60, 50, dtype=torch.float64)
    (found,) = damped_solves([factor], [block], Damping(DAMPING, "absolute"))
    torch.testing.assert_close(found, torch.linalg.solve(damped, block))


def test_the_average_of_sketches_tends_to_that_of_the_batches():
    """E AΩΩᵀAᵀ = AAᵀ: the error of the mean of t batches falls as 1/√t."""
    errors = []
    for steps in (4, 64):
        found = trained(Brand(24, sketch=5), steps, count=24, decay=1 - 1e-9)
        errors.append(torch.linalg.matrix_norm(found.factor - found.average) / torch.linalg.matrix_norm(found.average))
    # Sixteen times the batches: a fourth of the error, give or take half for one draw of each.
    assert errors[1] < 0.375 * errors[0]


@pytest.mark.parametrize(
    ("count", "sketch", "other"),
    [(24, 24, None), (24, "auto", None), (96, "auto", 32)],
    ids=["as-wide", "narrow", "wide"],
)
def test_only_batches_wider_than_the_sketch_are_sketched(count: int, sketch: int | str, other: int | None):
    assert torch.equal(*(trained(Brand(6, sketch=own), 3, count=count).factor for own in (sketch, other)))


@pytest.mark.parametrize(
    ("rank", "k", "expected"),
    [(4, 63, 63), (4, 64, 32), (40, 79, 79), (40, 80, 40), (128, 10**5, 128), (128, 128, 128)],
)
def test_the_width_of_a_sketch(rank: int, k: int, expected: int):
    assert sketch_width(rank, k) == expected


@pytest.mark.parametrize(
    "strategy", [Exact(), BrandRandomized(6), BrandCorrected(6)], ids=["exact", "randomized", "corrected"]
)
def test_the_dense_average_is_that_of_all_columns_of_all_batches(strategy: Strategy):
    """Σ ρ^(t−i) A_i A_iᵀ over Σ ρ^(t−i), also beside a sketch."""
    found = trained(strategy, 4, count=96, decay=0.7)
    state = found.preconditioner._layers[0].curvature.input.state
    torch.testing.assert_close(state["dense"] / state["total"], found.average)
    torch.testing.assert_close(state["total"].item(), 1 - 0.7**4)


def test_the_error_bound_of_a_root_holds():
    found = trained(Brand(6), 12, decay=0.9)
    error = torch.linalg.matrix_norm(found.average - found.factor, 2).item()
    assert error <= found.preconditioner.report().factors[0].error_bound <= 25 * error


def test_a_failed_factorisation_leaves_the_last_one():
    strategy = Exact(inverse_every=1, method="cholesky")
    state = strategy.start(5, (2,), torch.float64, torch.device("cpu"))
    state["total"] = torch.ones((), dtype=torch.float64)
    state["dense"] = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1) * 3
    damping = Damping(0.1, "relative")
    strategy.refresh(state, 0, 0, damping)
    good = state["cholesky"].clone()
    # Of the batch of two, the second is indefinite.
    state["dense"] = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1) * 7
    state["dense"][1, 2, 2] = -4
    strategy.refresh(state, 1, 0, damping)
    torch.testing.assert_close(state["cholesky"][0], torch.eye(5, dtype=torch.float64) * 7.7**0.5)
    assert torch.equal(state["cholesky"][1], good[1])
    torch.testing.assert_close(state["shift"], torch.tensor([0.7, 0.3], dtype=torch.float64))


def test_tiny_damping_is_lifted_to_the_rounding_of_the_factor():
    """Rank-deficient data in float32 with λ far below its rounding error: factorised, and the step is finite."""
    layer = mlp(200, 100, dtype=torch.float32)[0]
    preconditioner = KFAC(layer, Exact(inverse_every=1, method="cholesky"), damping=1e-12, clip=None)
    for _ in range(5):
        assert all(
            part.isfinite().all() for part in stepped(layer, preconditioner, layer(torch.randn(8, 200)).square().mean())
        )
    for row in preconditioner.report().factors:
        assert row.error_bound < 1e-3
        assert row.rank is None


def test_report_bounds_staleness_of_a_cholesky_factor():
    layer = mlp(20, 10)[0]
    preconditioner = KFAC(layer, Exact(inverse_every=10, method="cholesky"))
    bounds = []
    for seed in range(3):
        layer_step(layer, preconditioner, batch(30, 20, 10, seed))
        bounds.append(preconditioner.report().factors[0].error_bound)
    # n·ε·‖M‖ at the renewals; then the distance of the average of two batches from that of three.
    assert max(bounds[:2]) < 1e-13
    assert bounds[2] > 1e-3


@some_systems("exact", "cholesky", "randomized-eigh")
def test_layers_below_a_head_that_begins_at_zero_are_preconditioned_soon(strategy: Strategy):
    """Their first gradients are 0, and a rate that warms up from 0 makes the second ones so too."""
    model = mlp(10, 12, 4)
    nn.init.zeros_(model[2].weight)
    preconditioner = KFAC(model, replace(strategy, inverse_every=50), clip=None)
    for step in range(4):
        stepped(model, preconditioner, loss_of(model, batch(16, 10, 4, step)))
        if step:
            torch.optim.SGD(model.parameters(), 0.1).step()
    assert all((factor.largest() > 0).all() for factor in factors_of(preconditioner))


def test_foof_keeps_input_factors_alone_and_solves_with_the_pair_of_a_thin_batch():
    """The linear application is what `auto` takes here, for a network and for several steps, with the same result."""
    results, seen = [], []
    for application in ("auto", "two-sided"):
        model = mlp(40, 50, 30, 20)
        preconditioner = KFAC(model, Foof(Brand(16)), application=application)
        for seed in range(3):
            results.append(stepped(model, preconditioner, loss_of(model, batch(8, 40, 4, seed))))
        seen.append([layer.linear for layer in preconditioner._layers])
    assert seen == [[True] * 3, [None] * 3]
    torch.testing.assert_close(results[:3], results[3:])
    rows = [(row.side, row.n) for row in preconditioner.report().factors]
    assert rows == [("input", 41), ("input", 51), ("input", 31)]


def test_foof_leaves_scale_and_shift_of_a_normalisation_their_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    preconditioner = KFAC(model, Foof(Exact()), clip=None)
    loss_of(model, batch(12, 6, 3)).backward()
    before = gradients(model)
    preconditioner.step()
    assert list(map(torch.equal, before, gradients(model))) == [False, False, True, True, False, False]


def test_foof_divides_an_embedding_by_frequencies():
    model = nn.Embedding(6, 4, dtype=torch.float64)
    indices = torch.tensor([0, 0, 0, 2, 2, 5])
    preconditioner = KFAC(model, Foof(Exact()), damping=DAMPING, clip=None)
    (model(indices) * torch.randn(6, 4, dtype=torch.float64)).sum().backward()
    gradient = model.weight.grad.clone()
    preconditioner.step()
    frequencies = torch.tensor([3, 0, 2, 0, 0, 1], dtype=torch.float64) / 6
    assert_near(model.weight.grad, gradient / (frequencies + DAMPING * 0.5)[:, None], 1e-12)
