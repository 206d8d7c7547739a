"""The natural gradient of a batch against dense solves with F = N Σ v vᵀ, v by autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, Woodbury
from brandla.kfac.systems.samples import Samples
from brandla.kfac.values import Rows
from kfac.networks import Batch, batch, layer_gradient, loss_of, mlp
from kfac.systems import assert_near, fisher, layer_steps, linears, sample_gradients

DAMPING = 0.03
ABSOLUTE = {"damping": DAMPING, "damping_scale": "absolute", "clip": None}


def of_samples(layers: list[nn.Linear], model: nn.Module, data: Batch) -> list[list[Tensor]]:
    """v of each sample and layer."""
    inputs, labels = data
    return sample_gradients(layers, lambda n: loss_of(model, (inputs[n : n + 1], labels[n : n + 1])), len(labels))


def dense_step(parts: list[Tensor], gradient: Tensor, damping: float = DAMPING) -> Tensor:
    """(F + λI)⁻¹ times a gradient."""
    F = fisher([[part] for part in parts], len(parts))
    eye = torch.eye(len(F), dtype=F.dtype)
    return torch.linalg.solve(F + damping * eye, gradient.reshape(-1)).reshape(gradient.shape)


@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_step_of_each_layer_is_the_dense_solve(application: str, penalty: float):
    """Where the gradient is that of the rows, and where it is not."""
    model = mlp(12, 14, 5)
    data = batch(9, 12, 5)
    parts = of_samples(linears(model), model, data)
    preconditioner = KFAC(model, Woodbury(), application=application, **ABSOLUTE)
    loss = loss_of(model, data) + penalty * sum(weight.square().sum() for weight in model.parameters())
    loss.backward()
    expected = [
        dense_step([sample[index] for sample in parts], layer_gradient(layer))
        for index, layer in enumerate(linears(model))
    ]
    preconditioner.step()
    for layer, own in zip(linears(model), expected, strict=True):
        assert_near(layer_gradient(layer), own, 1e-10)
    pairs = [bool(layer.linear) for layer in preconditioner._layers]
    assert pairs == [application == "auto" and not penalty] * 2


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
    torch.manual_seed(0)
    rows = rows_of("rows", 7)
    samples = Samples.of(rows)
    assert samples.some_features(5, 0).inputs is samples.inputs
    # γ has three entries: three positions hold all.
    cut = samples.cut(3, 0)
    assert cut.positions == 3
    torch.testing.assert_close(cut.gram(), samples.gram())


def test_inner_products_of_some_features_are_right_on_average():
    samples = Samples.of(rows_of("rows", 2))
    mean = sum(samples.some_features(3, seed).gram() for seed in range(4000)) / 4000
    # Relative to its largest entry the deviation of one draw is about 1, of the mean 1/√4000.
    assert_near(mean, samples.gram(), 0.06)


class Positions(nn.Module):
    """A convolution, a normalisation and an embedding: positions, groups and indices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 2, groups=2)
        self.norm = nn.GroupNorm(2, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.conv(self.words(inputs).mT))).mean(-1))


def test_layers_of_every_kind_get_the_dense_solve():
    model = Positions().double()
    data = torch.randint(7, (8, 5)), torch.randint(3, (8,))
    modules = list(model.children())

    def flat() -> list[Tensor]:
        return [torch.cat([part.grad.reshape(-1) for part in module.parameters()]) for module in modules]

    parts = []
    for n in range(8):
        model.zero_grad()
        (loss_of(model, (data[0][n : n + 1], data[1][n : n + 1])) / 8).backward()
        parts.append(flat())
    preconditioner = KFAC(model, Woodbury(), **ABSOLUTE)
    model.zero_grad()
    loss_of(model, data).backward()
    expected = [dense_step([own[index] for own in parts], part) for index, part in enumerate(flat())]
    preconditioner.step()
    for result, own in zip(flat(), expected, strict=True):
        assert_near(result, own, 1e-9)


def test_relative_damping_goes_by_the_largest_eigenvalue():
    layer = nn.Linear(6, 4, dtype=torch.float64)
    data = batch(9, 6, 4)
    parts = [own for (own,) in of_samples([layer], layer, data)]
    F = fisher([[part] for part in parts], 9)
    preconditioner = KFAC(layer, Woodbury(), damping=DAMPING, clip=None)
    loss_of(layer, data).backward()
    gradient = layer_gradient(layer)
    preconditioner.step()
    shift = float(preconditioner._layers[0].curvature.state["shift"])
    largest = float(torch.linalg.eigvalsh(F)[-1])
    assert 0.9 * largest <= shift / DAMPING <= largest * (1 + 1e-12)
    assert_near(layer_gradient(layer), dense_step(parts, gradient, shift), 1e-10)


def test_a_kept_batch_solves_for_later_gradients():
    """SENG's period: F is that of the first batch, and of the fourth after three steps."""
    layer = nn.Linear(6, 4, dtype=torch.float64)
    preconditioner = KFAC(layer, Woodbury(every=3), **ABSOLUTE)
    for step in range(5):
        data = batch(9, 6, 4, seed=step)
        if step % 3 == 0:
            parts = [own for (own,) in of_samples([layer], layer, data)]
        layer.zero_grad()
        loss_of(layer, data).backward()
        expected = dense_step(parts, layer_gradient(layer))
        preconditioner.step()
        assert_near(layer_gradient(layer), expected, 1e-10)


@pytest.mark.parametrize("application", ["auto", "two-sided"])
def test_coefficients_stay_after_so_many_batches(application: str):
    """They belong to places in the order of ‖v‖; a batch of half the size takes every other one."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    preconditioner = KFAC(layer, Woodbury(fixed_after=3), application=application, **ABSOLUTE)
    kept = []
    for step, count in enumerate((8, 8, 8, 8, 4)):
        data = batch(count, 6, 4, seed=step)
        parts = [own for (own,) in of_samples([layer], layer, data)]
        order = torch.stack([part.norm() for part in parts]).argsort()
        v = torch.stack([part.reshape(-1) for part in parts])[order]
        if step < 3:
            gram = count * v @ v.T + DAMPING * torch.eye(count, dtype=v.dtype)
            kept.append(torch.linalg.solve(gram, torch.ones(count, dtype=v.dtype)))
        layer.zero_grad()
        loss_of(layer, data).backward()
        preconditioner.step()
        if step >= 2:
            mean = (kept[0] + kept[1] + kept[2]) / 3
            expected = (mean[:: 8 // count] @ v).reshape(4, 7)
            assert_near(layer_gradient(layer), expected, 1e-10)


def test_a_sketched_step_never_goes_uphill():
    for seed in range(20):
        model = mlp(30, 40, 5, seed=seed)
        data = batch(16, 30, 5, seed)
        preconditioner = KFAC(model, Woodbury(features=1), application="two-sided", seed=seed, damping=1e-4, clip=None)
        loss_of(model, data).backward()
        before = [layer_gradient(layer) for layer in linears(model)]
        preconditioner.step()
        for one, layer in zip(before, linears(model), strict=True):
            assert (one * layer_gradient(layer)).sum() >= -1e-9 * one.norm() * layer_gradient(layer).norm()


def test_memory_is_linear_in_the_layer():
    sizes = []
    for width in (100, 200, 400):
        layer = nn.Linear(width, width, bias=False)
        preconditioner = KFAC(layer, Woodbury())
        layer_steps(layer, preconditioner, layer(torch.randn(8, width)).square().mean())
        (row,) = preconditioner.report().factors
        sizes.append(row.bytes)
    assert row.side == "beside"
    assert sizes[0] == 4 * (8 * 200 + 8 * 8 + 1)
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


@pytest.mark.filterwarnings("ignore:KFAC. a batch was skipped")
def test_a_skipped_batch_leaves_what_is_kept():
    layer = nn.Linear(6, 4, dtype=torch.float64)
    preconditioner = KFAC(layer, Woodbury(fixed_after=5))
    states = []
    for seed, poison in enumerate((False, False, True)):
        inputs, labels = batch(5, 6, 4, seed)
        layer.zero_grad()
        loss_of(layer, (inputs * float("nan") if poison else inputs, labels)).backward()
        preconditioner.step()
        states.append([part.clone() for part in preconditioner._layers[0].curvature.tensors()])
    assert all(torch.equal(one, other) for one, other in zip(states[1], states[2], strict=True))
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight.grad))
