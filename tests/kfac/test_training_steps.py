"""Steps as training takes them: batches that are not finite, schedules, groups, frozen layers, clips, misuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KBFGS, KFAC, Strategy
from brandla.kfac.clip import by_rms
from kfac.networks import EXACT, batch, gradients, layer_gradient, loss_of, mlp, stepped
from kfac.systems import every_system, factors_of, tensors

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")


def after(model: nn.Module, preconditioner: KFAC, seed: int) -> list[Tensor]:
    return stepped(model, preconditioner, loss_of(model, batch(8, 10, 4, seed)))


# What is beyond the range of float32, or is only once it is squared.
BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "input": lambda inputs: inputs.masked_fill(torch.arange(60) == 2, math.nan),
    "inputs squared": lambda inputs: 1e20 * inputs,
}
LARGE = {"loss": math.inf, "loss squared": 1e22}


def broken_backward(model: nn.Module, seed: int, what: str) -> None:
    inputs, labels = batch(8, 60, 4, seed, torch.float32)
    loss = loss_of(model, (BROKEN.get(what, torch.clone)(inputs), labels))
    (LARGE.get(what, 1) * loss).backward()
    if what == "gradient":
        model[-1].weight.grad[0, 0] = math.inf


def kept(preconditioner: KFAC) -> list[Tensor]:
    """M of the factors, whose sums decay as their weights do, and whose columns may be turned; or all there is."""
    states = [factor.state for factor in factors_of(preconditioner)]
    operands = [factor.operand() for factor in factors_of(preconditioner)]
    found = [
        state["dense"] / state["total"] if "dense" in state else operand.dense()
        for state, operand in zip(states, operands, strict=True)
    ]
    return found or tensors(preconditioner)


@pytest.mark.parametrize("free", [True, False], ids=["host", "device"])
@every_system
def test_batches_that_are_not_finite_count_for_nothing(strategy: Strategy, free: bool, monkeypatch: pytest.MonkeyPatch):
    """Also where it is the very first one. As on a device, where nobody knows, nothing is read back to find out."""
    monkeypatch.setattr("brandla.kfac.capture.mask.reads_are_free", lambda tensor: free)
    model = mlp(60, 50, 4, dtype=torch.float32)
    preconditioner = KFAC(model, strategy)
    batches = ["input", "", "loss", "", "gradient", "loss squared", "", "inputs squared", "input", ""]
    for seed, what in enumerate(batches):
        before = kept(preconditioner) if seed else []
        model.zero_grad()
        broken_backward(model, seed, what)
        preconditioner.step()
        assert all(torch.isfinite(gradient).all() for gradient in gradients(model))
        assert all(bool(gradient.any()) == (not what) for gradient in gradients(model))
        if what and seed > 6 and not isinstance(strategy, KBFGS):
            # Columns of Brand are turned, or polished once more; rows stay to the bit. K-BFGS keeps sums, which decay.
            rounding = 16 * torch.finfo(torch.float32).eps if factors_of(preconditioner) else 0
            for one, other in zip(kept(preconditioner), before, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=rounding * float(other.abs().max()))
    assert preconditioner.report().skipped == 6
    assert all(torch.isfinite(part).all() for part in tensors(preconditioner))


def test_a_layer_takes_part_while_it_is_trained():
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, EXACT, factor_every=10)
    first = preconditioner._layers[0]
    model[0].requires_grad_(False)
    after(model, preconditioner, 1)
    assert not first.curvature.started
    model[0].requires_grad_(True)
    model.zero_grad()
    loss_of(model, batch(8, 10, 4, 1)).backward()
    before = model[0].weight.grad.clone()
    preconditioner.step()
    assert first.curvature.started
    assert not torch.equal(model[0].weight.grad, before)
    total = first.curvature.input.state["total"].clone()
    model[0].requires_grad_(False)
    for seed in range(10):
        after(model, preconditioner, seed)
    assert model[0].weight.grad is None
    assert torch.equal(first.curvature.input.state["total"], total)


def test_a_bias_that_freezes_takes_no_part():
    found = []
    for application in ("auto", "two-sided"):
        model = mlp(10, 20, 4)
        preconditioner = KFAC(model, EXACT, application=application)
        after(model, preconditioner, 0)
        model[0].bias.requires_grad_(False)
        found.append(after(model, preconditioner, 1))
    torch.testing.assert_close(found[0], found[1])


def test_schedules_are_functions_of_the_step():
    asked: dict[str, list[int]] = {}

    def schedule(name: str, values: list[float | None]) -> object:
        return lambda step: (asked.setdefault(name, []).append(step), values[step % len(values)])[1]

    values = {"damping": [0.1, 0.2, 0.3], "clip": [None, 1e-3, 1e-2], "decay": [0.9, 0.5, 0.7], "factor_every": [1] * 3}
    model, reference = mlp(10, 20, 4), mlp(10, 20, 4)
    scheduled = KFAC(model, EXACT, **{name: schedule(name, own) for name, own in values.items()})
    fixed = KFAC(reference, EXACT)
    for index in range(3):
        for name, own in values.items():
            object.__setattr__(fixed.options, name, own[index])
        found, expected = after(model, scheduled, index), after(reference, fixed, index)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert asked.keys() == values.keys()
    assert set(asked["damping"]) == {0, 1, 2, 3}


def test_a_step_whose_length_is_not_finite_is_none():
    assert by_rms([[torch.full((2,), math.inf)]], 0.07)[0] == 0


@pytest.mark.parametrize("free", [True, False], ids=["host", "device"])
def test_a_second_step_with_no_new_gradient_does_nothing(free: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("brandla.kfac.capture.mask.reads_are_free", lambda tensor: free)
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, EXACT)
    once = after(model, preconditioner, 0)
    preconditioner.step()
    torch.testing.assert_close(gradients(model), once, rtol=0, atol=0)
    after(model, preconditioner, 1)
    assert not torch.equal(gradients(model)[0], once[0])


@every_system
def test_factors_follow_a_model_that_gets_another_dtype(strategy: Strategy):
    model = mlp(10, 40, 4, dtype=torch.float32)
    preconditioner = KFAC(model, strategy)
    stepped(model, preconditioner, loss_of(model, batch(8, 10, 4, dtype=torch.float32)))
    model.double()
    gradients_after = stepped(model, preconditioner, loss_of(model, batch(8, 10, 4)))
    assert {part.dtype for part in tensors(preconditioner)} == {torch.float64}
    assert all(torch.isfinite(gradient).all() for gradient in gradients_after)


def test_modules_that_are_added_later_are_left_alone():
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, EXACT)
    model.append(nn.Linear(4, 4, dtype=torch.float64))
    loss_of(model, batch(8, 10, 4)).backward()
    before = layer_gradient(model[-1])
    preconditioner.step()
    assert torch.equal(layer_gradient(model[-1]), before)
