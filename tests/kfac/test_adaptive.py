"""Damping that follows the ratio of the loss's reduction to the predicted one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, Adaptive, Exact
from kfac.networks import batch, loss_of, mlp


class Quadratic:
    """A linear model with the squared error, whose exact curvature is A ⊗ (2/C) I, and a step of it."""

    def __init__(self, damping: Adaptive, factor: float = 1.0, **options: object) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3, bias=False, dtype=torch.float64)
        self.inputs, self.targets = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
        self.factor = factor
        self.preconditioner = KFAC(
            self.layer, Exact(inverse_every=1), damping=damping, curvature="type-2", **{"clip": None} | options
        )

    def loss(self) -> Tensor:
        return self.factor * nn.functional.mse_loss(self.layer(self.inputs), self.targets)

    def step(self, rate: float) -> float | None:
        self.layer.zero_grad()
        self.preconditioner.curvature(self.layer(self.inputs), loss="mse")
        loss = self.loss()
        loss.backward()
        self.gradient = self.layer.weight.grad.clone()
        self.preconditioner.step()
        torch.optim.SGD(self.layer.parameters(), rate).step()
        return self.preconditioner.adapt(loss, self.loss)


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_the_ratio_of_a_quadratic_is_that_of_its_hessian_and_the_damped_one(scale: str, clip: float | None):
    task = Quadratic(Adaptive(0.2, every=1), damping_scale=scale, clip=clip)
    before = task.layer.weight.detach().clone()
    ratio = task.step(0.5)
    eye = [torch.eye(n, dtype=torch.float64) for n in (6, 3)]
    A, G = task.inputs.T @ task.inputs / 9, 2 / 3 * eye[1]
    shifts = [0.2 * (torch.linalg.eigvalsh(M)[-1] if scale == "relative" else 1) for M in (A, G)]
    change = task.layer.weight.detach() - before
    slope = (task.gradient * change).sum()
    exact = slope + (change * (G @ change @ A)).sum() / 2
    damped = slope + (change * ((G + shifts[1] * eye[1]) @ change @ (A + shifts[0] * eye[0]))).sum() / 2
    assert ratio == pytest.approx(float(exact / damped), rel=1e-9)
    assert ratio > 1


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.1 * 0.9**2), (4.0, 0.1 / 0.9**2)])
def test_damping_falls_where_the_model_is_right_and_rises_where_the_loss_is_steeper(factor: float, expected: float):
    """Every second step; its curvature knows nothing of a loss that is multiplied."""
    task = Quadratic(Adaptive(0.1, every=2, factor=0.9), factor)
    assert task.step(1.0) is not None
    assert task.preconditioner._adapted == pytest.approx(expected)
    assert task.step(1.0) is None
    assert task.preconditioner._adapted == pytest.approx(expected)


def test_bounds_hold_and_a_loss_that_is_not_finite_raises_the_damping():
    adaptive = Adaptive(0.1, every=1, factor=0.5, least=0.08, most=0.15)
    found = [adaptive.next(0.1, ratio) for ratio in (1.0, 0.5, 0.1, float("nan"), -float("inf"))]
    assert found == [0.08, 0.1, 0.15, 0.15, 0.15]


def test_the_damping_goes_on_from_a_checkpoint():
    task, resumed = (Quadratic(Adaptive(0.1, every=1)) for _ in range(2))
    task.step(0.5)
    resumed.preconditioner.load_state_dict(task.preconditioner.state_dict())
    assert resumed.preconditioner._adapted == task.preconditioner._adapted != 0.1


@pytest.mark.filterwarnings("ignore:KFAC. some factors")
def test_a_network_is_trained_with_every_kind_of_gradient():
    model = nn.Sequential(*mlp(10, 12, 12), nn.LayerNorm(12).double(), nn.Linear(12, 4).double())
    preconditioner = KFAC(model, Exact(), damping=Adaptive(0.1, every=2), gradient="pair", clip=0.05)
    optimizer, data = torch.optim.SGD(model.parameters(), 0.1), batch(16, 10, 4)
    first = loss_of(model, data).item()
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        preconditioner.adapt(loss, lambda: loss_of(model, data))
    assert loss_of(model, data) < first
    assert preconditioner._adapted != 0.1


def test_a_look_that_comes_too_late_or_for_nothing_is_refused():
    task = Quadratic(Adaptive(0.1, every=1))
    task.preconditioner.curvature(task.layer(task.inputs), loss="mse")
    loss = task.loss()
    loss.backward()
    task.preconditioner.step()
    task.layer.zero_grad()
    with pytest.raises(
        RuntimeError, match=r"KFAC.adapt: \(model\).weight has no gradient; call adapt before zero_grad"
    ):
        task.preconditioner.adapt(loss, task.loss)
    with pytest.raises(RuntimeError, match=r"KFAC.adapt: damping must be Adaptive"):
        KFAC(nn.Linear(3, 3)).adapt(loss, task.loss)
