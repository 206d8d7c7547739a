"""The step against dense formulas, and against the Gauss–Newton matrix where K-FAC is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, Exact, Foof, Strategy
from brandla.kfac.systems.kronecker import FactorStrategy
from kfac.networks import batch, damped_inverse, dense_step, layer_gradient, layer_step, loss_of, mlp, stepped
from kfac.systems import assert_near, damped_solve, full_rank

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


def test_step_is_the_damped_gauss_newton_step_where_kfac_is_exact():
    """A deep linear network whose residuals form a full factorial with its inputs: the Fisher is A ⊗ G exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False, dtype=torch.float64) for _ in range(3)))
    inputs = torch.randn(7, 5, dtype=torch.float64).repeat_interleave(5, dim=0)
    targets = model(inputs).detach() - 5**0.5 * torch.eye(5, dtype=torch.float64).repeat(7, 1)
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
    assert_near(middle.grad, damped_solve(gauss_newton, gradient), 4e-4)


@pytest.mark.parametrize("application", ["auto", "two-sided"])
def test_clip_bounds_the_rms_of_each_layer_and_keeps_its_direction(application: str):
    """One above the length changes nothing."""
    steps: list[list[Tensor]] = []
    for clip in (None, 1e-3, 1e6):
        model = mlp(10, 30, 30, 4)
        stepped(model, KFAC(model, Exact(), clip=clip, application=application), loss_of(model, batch(16, 10, 4)))
        steps.append([layer_gradient(layer) for layer in model[::2]])
    torch.testing.assert_close(steps[2], steps[0])
    for long, short in zip(*steps[:2], strict=True):
        assert short.square().mean().sqrt().item() == pytest.approx(1e-3)
        torch.testing.assert_close(short / short.norm(), long / long.norm())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_sharing_is_exact_in_its_own_setting(sharing: str):
    """expand: every position has a loss term of its own. reduce: the outputs are averaged over positions first."""
    layer = mlp(5, 4, bias=False)[0]
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
