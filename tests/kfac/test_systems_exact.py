"""K-FAC by Cholesky factorisation: the same step as by eigendecomposition, and what happens when it fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Exact, Strategy
from brandla.kfac.values import Damping
from kfac.networks import batch, damped_inverse, layer_gradient, loss_of, mlp, stepped, with_one
from kfac.systems import assert_near, layer_steps, some_systems

DAMPING = 0.03
# A few hundred operations in float64 on systems of condition 1/damping.
ROUNDING = 1e-10


@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_cholesky_takes_the_step_of_eigh(scale: str):
    steps = {}
    inputs, labels = batch(40, 30, 5)
    for method in ("eigh", "cholesky"):
        model = mlp(30, 25, 5)
        preconditioner = KFAC(
            model, Exact(inverse_every=1, method=method), damping=DAMPING, damping_scale=scale, clip=None
        )
        steps[method] = layer_steps(model, preconditioner, nn.functional.cross_entropy(model(inputs), labels))
    for one, other in zip(steps["cholesky"], steps["eigh"], strict=True):
        # Relative damping goes by an estimate of the largest eigenvalue from below.
        assert_near(one, other, ROUNDING if scale == "absolute" else 0.05)


def test_cholesky_is_the_dense_formula_at_its_own_damping():
    """λ is what the state says, four power iterations' estimate of damping · d₁, and the step is that of this λ."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, dtype=torch.float64)
    inputs, labels = batch(40, 30, 20)
    preconditioner = KFAC(layer, Exact(inverse_every=1, method="cholesky"), damping=DAMPING, clip=None)
    outputs = layer(inputs)
    outputs.retain_grad()
    nn.functional.cross_entropy(outputs, labels).backward()
    gradient = layer_gradient(layer)
    preconditioner.step()
    inverses = []
    state = preconditioner.state_dict()["layers"]["(model)"]["curvature"]
    for side, rows in (("output", outputs.grad * len(inputs)), ("input", with_one(inputs))):
        factor = rows.T @ rows / len(inputs)
        largest = torch.linalg.eigvalsh(factor)[-1]
        shift = state[side]["state"]["shift"]
        assert 0.8 * DAMPING * largest <= shift <= DAMPING * largest * (1 + 1e-12)
        inverses.append(damped_inverse(factor, float(shift / largest)))
    assert_near(layer_gradient(layer), inverses[0] @ gradient @ inverses[1], ROUNDING)


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
    torch.manual_seed(0)
    layer = nn.Linear(200, 100)
    preconditioner = KFAC(layer, Exact(inverse_every=1, method="cholesky"), damping=1e-12, clip=None)
    for _ in range(5):
        layer.zero_grad()
        layer(torch.randn(8, 200)).square().mean().backward()
        preconditioner.step()
        assert torch.isfinite(layer.weight.grad).all()
    for row in preconditioner.report().factors:
        assert row.error_bound < 1e-3
        assert row.rank is None


def test_report_bounds_staleness_of_a_cholesky_factor():
    layer = nn.Linear(20, 10, dtype=torch.float64)
    preconditioner = KFAC(layer, Exact(inverse_every=10, method="cholesky"))
    bounds = []
    for seed in range(3):
        stepped(layer, preconditioner, loss_of(layer, batch(30, 20, 10, seed)))
        bounds.append(preconditioner.report().factors[0].error_bound)
    # n·ε·‖M‖ at the renewals; then the distance of the average of two batches from that of three.
    assert max(bounds[:2]) < 1e-13
    assert bounds[2] > 1e-3


@pytest.mark.filterwarnings("ignore:KFAC. some factors are too small")
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
    factor = preconditioner._layers[0].curvature.factors()
    assert all((own.largest() > 0).all() for _, own in factor)
