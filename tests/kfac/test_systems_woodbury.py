"""The natural gradient of a batch against dense solves with F = N Σ v vᵀ, v by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, Woodbury
from brandla.kfac.systems.samples import Samples
from brandla.kfac.values import Rows
from kfac.networks import Batch, Words, batch, layer_gradient, layer_step, loss_of, mlp
from kfac.systems import assert_near, damped_solve, fisher, layer_steps, linears, loss_on, sample_gradients

DAMPING = 0.03
ABSOLUTE = {"damping": DAMPING, "damping_scale": "absolute", "clip": None}

both_applications = pytest.mark.parametrize("application", ["auto", "two-sided"])


def fishers(layers: Sequence[nn.Module], model: nn.Module, data: Batch) -> list[Tensor]:
    """F of each layer."""
    samples = len(data[1])
    parts = sample_gradients(layers, loss_on(model, data), samples)
    return [fisher([[own[index]] for own in parts], samples) for index in range(len(layers))]


def assert_solves(layers: Sequence[nn.Module], preconditioner: KFAC, loss: Tensor, known: Sequence[Tensor]) -> None:
    """A step is that of the dense solve with a known F of each layer."""
    for layer in layers:
        layer.zero_grad()
    loss.backward()
    gradients = [layer_gradient(layer) for layer in layers]
    preconditioner.step()
    for layer, F, gradient in zip(layers, known, gradients, strict=True):
        assert_near(layer_gradient(layer), damped_solve(F, gradient, DAMPING), 1e-9)


@both_applications
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_step_of_each_layer_is_the_dense_solve(application: str, penalty: float):
    """Where the gradient is that of the rows, and where it is not."""
    model, data = mlp(12, 14, 5), batch(9, 12, 5)
    known = fishers(linears(model), model, data)
    preconditioner = KFAC(model, Woodbury(), application=application, **ABSOLUTE)
    loss = loss_of(model, data) + penalty * sum(weight.square().sum() for weight in model.parameters())
    assert_solves(linears(model), preconditioner, loss, known)
    pairs = [bool(layer.linear) for layer in preconditioner._layers]
    assert pairs == [application == "auto" and not penalty] * 2


def test_layers_of_every_kind_get_the_dense_solve():
    model, data = Words(7, 4, 3), (torch.randint(7, (8, 5)), torch.randint(3, (8,)))
    layers = list(model.children())
    known = fishers(layers, model, data)
    assert_solves(layers, KFAC(model, Woodbury(), **ABSOLUTE), loss_of(model, data), known)


def test_a_kept_batch_solves_for_later_gradients():
    """SENG's period: F is that of the first batch, and of the fourth after three steps."""
    layer = mlp(6, 4)[0]
    preconditioner = KFAC(layer, Woodbury(every=3), **ABSOLUTE)
    for step in range(5):
        data = batch(9, 6, 4, seed=step)
        if step % 3 == 0:
            known = fishers([layer], layer, data)
        assert_solves([layer], preconditioner, loss_of(layer, data), known)


def test_relative_damping_goes_by_the_largest_eigenvalue():
    layer, data = mlp(6, 4)[0], batch(9, 6, 4)
    (F,) = fishers([layer], layer, data)
    preconditioner = KFAC(layer, Woodbury(), damping=DAMPING, clip=None)
    step = layer_step(layer, preconditioner, data)
    shift = float(preconditioner._layers[0].curvature.state["shift"])
    largest = float(torch.linalg.eigvalsh(F)[-1])
    assert 0.9 * largest <= shift / DAMPING <= largest * (1 + 1e-12)
    assert_near(step.result, damped_solve(F, step.gradient, shift), 1e-10)


def rows_of(kind: str, positions: int) -> Rows:
    torch.manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64)
    count = 6 * positions
    if kind == "indices":
        return Rows(torch.randint(4, (count,)), draw(count, 3), count, positions)
    groups = (2,) if kind == "groups" else ()
    return Rows(draw(*groups, count, 5), draw(*groups, count, 3), count, positions)


@pytest.mark.parametrize("positions", [1, 2, 7])
@pytest.mark.parametrize("kind", ["rows", "groups", "indices"])
def test_gram_matrix_is_that_of_the_gradients_of_samples(kind: str, positions: int, monkeypatch: pytest.MonkeyPatch):
    """From products and from gradients, in one piece and in many."""
    rows = rows_of(kind, positions)
    inputs = rows.inputs if kind != "indices" else nn.functional.one_hot(rows.inputs, 4).double()
    left, right = (side.unflatten(-2, (6, positions)) for side in (rows.gradients, inputs))
    v = (left.mT @ right).movedim(-3, 0).flatten(1)
    samples = Samples.of(rows)
    for at_once in (2**22, 1):
        monkeypatch.setattr("brandla.kfac.systems.samples._AT_ONCE", at_once)
        torch.testing.assert_close(samples.gram(), rows.uses * v @ v.T)
    torch.testing.assert_close(samples.squares(), rows.uses * v.square().sum(1))


def test_all_features_and_positions_are_no_sketch():
    samples = Samples.of(rows_of("rows", 7))
    assert samples.some_features(5, 0).inputs is samples.inputs
    # γ has three entries: three positions hold all.
    cut = samples.cut(3, 0)
    assert cut.positions == 3
    torch.testing.assert_close(cut.gram(), samples.gram())


def test_inner_products_of_some_features_are_right_on_average():
    samples = Samples.of(rows_of("rows", 2))
    mean = sum(samples.some_features(3, seed).gram() for seed in range(1000)) / 1000
    # Relative to its largest entry the deviation of one draw is about 1, of the mean 1/√1000.
    assert_near(mean, samples.gram(), 0.12)


@both_applications
def test_coefficients_stay_after_so_many_batches(application: str):
    """They belong to places in the order of ‖v‖; a batch of half the size takes every other one."""
    layer = mlp(6, 4)[0]
    preconditioner = KFAC(layer, Woodbury(fixed_after=3), application=application, **ABSOLUTE)
    kept = []
    for step, count in enumerate((8, 8, 8, 8, 4)):
        data = batch(count, 6, 4, seed=step)
        v = torch.stack([own.reshape(-1) for (own,) in sample_gradients([layer], loss_on(layer, data), count)])
        v = v[v.norm(dim=1).argsort()]
        if step < 3:
            kept.append(damped_solve(count * v @ v.T, torch.ones(count, dtype=v.dtype), DAMPING))
        result = layer_step(layer, preconditioner, data).result
        if step >= 2:
            mean = (kept[0] + kept[1] + kept[2]) / 3
            assert_near(result, (mean[:: 8 // count] @ v).reshape(4, 7), 1e-10)


def test_a_sketched_step_never_goes_uphill():
    for seed in range(20):
        model = mlp(30, 40, 5, seed=seed)
        preconditioner = KFAC(model, Woodbury(features=1), application="two-sided", seed=seed, damping=1e-4, clip=None)
        loss_of(model, batch(16, 30, 5, seed)).backward()
        before = [layer_gradient(layer) for layer in linears(model)]
        preconditioner.step()
        for one, other in zip(before, map(layer_gradient, linears(model)), strict=True):
            assert (one * other).sum() >= -1e-9 * one.norm() * other.norm()


def test_memory_is_linear_in_the_layer():
    layer = mlp(300, 200, bias=False, dtype=torch.float32)[0]
    preconditioner = KFAC(layer, Woodbury())
    layer_steps(layer, preconditioner, layer(torch.randn(8, 300)).square().mean())
    (row,) = preconditioner.report().factors
    assert row.side == "beside"
    assert row.bytes == 4 * (8 * (300 + 200) + 8 * 8 + 1)
