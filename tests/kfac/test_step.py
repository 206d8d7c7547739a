"""The step against dense formulas, and against the Gauss–Newton matrix where K-FAC is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Brand, Exact, Strategy
from kfac.networks import batch, damped_inverse, dense_step, layer_gradient, loss_of, mlp, stepped, with_one
from kfac.systems import full_rank

DAMPING = 0.03

FULL_RANK = full_rank(24)


@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("strategy", FULL_RANK.values(), ids=FULL_RANK)
@pytest.mark.filterwarnings("ignore:KFAC")
def test_one_batch_equals_the_dense_formula(strategy: Strategy, application: str):
    torch.manual_seed(0)
    layer = nn.Linear(60, 50, dtype=torch.float64)
    inputs, labels = batch(8, 60, 50)
    preconditioner = KFAC(layer, strategy, damping=DAMPING, clip=None, application=application)
    outputs = layer(inputs)
    outputs.retain_grad()
    nn.functional.cross_entropy(outputs, labels).backward()
    gradient, rows = layer_gradient(layer), with_one(inputs)
    preconditioner.step()
    averages = {"input": rows.T @ rows / 8, "output": 8 * outputs.grad.T @ outputs.grad}
    inverses = {}
    for side, factor in preconditioner._layers[0].curvature.factors():
        true, found = torch.linalg.eigvalsh(averages[side])[-1], factor.largest()
        # compress="cholesky" estimates d₁ from below, and with it the damping.
        assert (0.9 if getattr(strategy, "compress", "") == "cholesky" else 1 - 1e-12) <= found / true <= 1 + 1e-12
        inverses[side] = damped_inverse(averages[side], DAMPING, found)
    expected = inverses["output"] @ gradient @ inverses["input"]
    torch.testing.assert_close(layer_gradient(layer), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("strategy", list(FULL_RANK.values())[3:], ids=list(FULL_RANK)[3:])
@pytest.mark.filterwarnings("ignore:KFAC")
def test_brand_equals_exact_while_its_rank_holds_all_data(strategy: Strategy):
    """Three batches of 8 have rank 24: nothing is truncated."""
    steps = {}
    for name, system in {"exact": Exact(inverse_every=1), "brand": strategy}.items():
        layer = nn.Linear(60, 50, dtype=torch.float64)
        torch.manual_seed(3)
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        preconditioner = KFAC(layer, system, damping=DAMPING, clip=None)
        for seed in range(3):
            stepped(layer, preconditioner, loss_of(layer, batch(8, 60, 50, seed)))
        steps[name] = layer_gradient(layer)
    scale = float(steps["exact"].abs().max())
    tolerance = 2e-2 if getattr(strategy, "compress", "") == "cholesky" else 1e-8
    torch.testing.assert_close(steps["brand"], steps["exact"], rtol=0, atol=tolerance * scale)


def test_step_is_the_damped_gauss_newton_step_where_kfac_is_exact():
    """A deep linear network whose residuals form a full factorial with its inputs: the Fisher is A ⊗ G exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False, dtype=torch.float64) for _ in range(3)))
    points = torch.randn(7, 5, dtype=torch.float64)
    residuals = torch.eye(5, dtype=torch.float64) * 5**0.5
    inputs = points.repeat_interleave(5, dim=0)
    with torch.no_grad():
        targets = model(inputs) - residuals.repeat(7, 1)
    preconditioner = KFAC(model, Exact(inverse_every=1), damping=1e-6, damping_scale="absolute", clip=None)
    (0.5 * (model(inputs) - targets).square().sum(1).mean()).backward()
    middle = model[1].weight
    gradient = middle.grad.clone()
    preconditioner.step()
    # Gauss–Newton of the half squared error: mean of JᵀJ, J the derivative of the output by the middle weight.
    jacobian = torch.autograd.functional.jacobian(
        lambda weight: (inputs @ model[0].weight.T @ weight.T) @ model[2].weight.T, middle
    ).reshape(len(inputs), 5, 25)
    gauss_newton = torch.einsum("nci,ncj->ij", jacobian, jacobian) / len(inputs)
    expected = torch.linalg.solve(gauss_newton, gradient.reshape(-1)).reshape(5, 5)
    torch.testing.assert_close(middle.grad, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


def test_average_weights_all_batches_of_the_past():
    """M is Σ ρ^(t−i) A_i A_iᵀ over Σ ρ^(t−i)."""
    layer = nn.Linear(6, 3, bias=False, dtype=torch.float64)
    preconditioner = KFAC(layer, Exact(inverse_every=1), decay=0.7)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for seed in range(4):
        data = batch(5, 6, 3, seed)
        stepped(layer, preconditioner, loss_of(layer, data))
        expected = 0.7 * expected + 0.3 * data[0].T @ data[0] / 5
    state = preconditioner.state_dict()["layers"]["(model)"]["curvature"]["input"]["state"]
    torch.testing.assert_close(state["dense"], expected)
    torch.testing.assert_close(state["total"].item(), 1 - 0.7**4)


def test_clip_bounds_the_rms_of_each_layer_and_keeps_its_direction():
    free, clipped = (mlp(10, 30, 30, 4) for _ in range(2))
    for model, clip in ((free, None), (clipped, 1e-3)):
        stepped(model, KFAC(model, Exact(), clip=clip), loss_of(model, batch(16, 10, 4)))
    for long, short in zip(free[::2], clipped[::2], strict=True):
        ratio = layer_gradient(short) / layer_gradient(long)
        assert layer_gradient(short).square().mean().sqrt().item() == pytest.approx(1e-3)
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


@pytest.mark.parametrize("application", ["auto", "two-sided"])
def test_a_clip_above_the_rms_changes_nothing(application: str):
    found = []
    for clip in (None, 1e6):
        model = mlp(10, 30, 4)
        preconditioner = KFAC(model, Exact(), clip=clip, application=application)
        found.append(stepped(model, preconditioner, loss_of(model, batch(16, 10, 4))))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_sharing_is_exact_in_its_own_setting(sharing: str):
    """expand: every position has a loss term of its own. reduce: the outputs are averaged over positions first."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False, dtype=torch.float64)
    points = torch.randn(6, 3, 5, dtype=torch.float64)
    preconditioner = KFAC(layer, Exact(inverse_every=1), sharing=sharing, clip=None, damping=0.1)
    outputs = layer(points)
    outputs = outputs if sharing == "expand" else outputs.mean(1)
    weights = torch.randn(outputs.shape, dtype=torch.float64)
    terms = outputs.numel() // 4
    ((outputs * weights).sum() / terms).backward()
    gradient = layer.weight.grad.clone()
    preconditioner.step()
    rows = points.reshape(-1, 5) if sharing == "expand" else points.mean(1)
    expected = dense_step(rows, weights.reshape(-1, 4) / terms, gradient, 0.1)
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("tail", ["smallest", 0.5])
def test_tail_is_what_unseen_directions_are_taken_for(tail: float | str):
    """A gradient orthogonal to all data seen is divided by τ + λ on both sides."""
    layer = nn.Linear(40, 30, bias=False, dtype=torch.float64)
    preconditioner = KFAC(
        layer, Brand(4, tail=tail), damping=1.0, damping_scale="absolute", clip=None, application="two-sided"
    )
    inputs = torch.zeros(6, 40, dtype=torch.float64)
    inputs[:, :6] = torch.diag(torch.arange(6.0, 0, -1, dtype=torch.float64))
    layer(inputs)[:, :6].diagonal().sum().backward()
    layer.weight.grad.zero_()
    layer.weight.grad[-1, -1] = 1.0
    preconditioner.step()
    smallest = [row["state"]["gram"].diagonal()[-1] for row in _factors(preconditioner)]
    left, right = smallest if tail == "smallest" else (tail, tail)
    assert layer.weight.grad[-1, -1].item() == pytest.approx(float(1 / ((left + 1) * (right + 1))))


def _factors(preconditioner: KFAC) -> list[dict]:
    entry = preconditioner.state_dict()["layers"]["(model)"]["curvature"]
    return [entry["output"], entry["input"]]
