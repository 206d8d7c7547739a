"""Strategies, clip, states and masks where they once failed: cancelling gradients, penalties, mixed precisions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, Brand, Exact, InverseFree, Strategy, TwoLevel
from brandla.kfac.capture.mask import Mask
from brandla.kfac.clip import by_kl
from brandla.kfac.systems.two_level import _unit
from brandla.kfac.values import Rows
from kfac.networks import Batch, batch, gradients, loss_of, mlp, stepped, train
from kfac.systems import every_system

pytestmark = pytest.mark.filterwarnings("ignore:KFAC", "ignore:.*torch.distributed is disabled")


def data(seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    return batch(8, 10, 4, seed, dtype)


def all_finite(parts: list[Tensor]) -> bool:
    return all(bool(part.isfinite().all()) for part in parts)


def cancelling(seed: int, rest: float) -> tuple[Tensor, Tensor]:
    """A pair of twice 16 columns with P Qᵀ smaller by ``rest`` than the terms of the sum."""
    generator = torch.Generator().manual_seed(seed)
    first, second, error = (torch.randn(n, 16, generator=generator) for n in (60, 80, 80))
    return torch.cat([first, first], dim=1), torch.cat([second, rest * error - second], dim=1)


@pytest.mark.parametrize("rest", [0.0, 1e-6, 1e-4])
def test_a_step_that_cancels_is_clipped_too(rest: float):
    """It is as long as its entries are: the Gram matrices of its pair give a square of either sign, all of it rounding.

    Inputs are there twice, with gradients that are opposite up to ``rest``; λ is so small that what is left of their
    sum is as long as the bound and more.
    """
    for seed in range(5):
        first, second = cancelling(seed, rest)
        model = mlp(60, 80, bias=False, seed=seed, dtype=torch.float32)[0]
        preconditioner = KFAC(model, Brand(16), damping=1e-7, clip=0.07)
        # The gradient of the sum of outputs times a constant is that constant, sample by sample.
        (step,) = stepped(model, preconditioner, (model(first.mT) * second.mT).sum())
        assert step.isfinite().all()
        # A sum of 4800 squares: a relative error of a few ε.
        assert step.double().square().mean().sqrt() <= 0.07 * (1 + 1e3 * torch.finfo(torch.float32).eps)


def test_the_kl_clip_and_unit_vectors_of_the_coarse_space_are_finite_where_pairs_cancel():
    pairs = [cancelling(seed, 1e-6) for seed in range(20)]
    assert by_kl(pairs, pairs, 1e-3).isfinite()
    for seed in range(20):
        first, second = _unit(cancelling(seed, 1e-5))
        assert first.isfinite().all()
        # No longer than 1, however small the product is.
        assert torch.linalg.matrix_norm(first.double() @ second.double().mT) <= 1


@pytest.mark.parametrize(
    "strategy",
    [Brand(16), Exact(), InverseFree(), TwoLevel(Brand(16)), TwoLevel(Exact(), space="residual")],
    ids=["brand", "exact", "inverse-free", "two-level", "residual"],
)
def test_weights_stay_finite_where_gradients_of_samples_cancel(strategy: Strategy):
    """Every input is there twice, with targets on either side: at the optimum terms are left of a gradient of 0."""
    torch.manual_seed(0)
    inputs, targets, errors = torch.randn(8, 100), torch.randn(8, 60), torch.randn(8, 60)
    inputs, targets = torch.cat([inputs, inputs]), torch.cat([targets + errors, targets - errors])
    model = nn.Linear(100, 60)
    preconditioner = KFAC(model, strategy, damping=1.0)
    for _ in range(80):
        stepped(model, preconditioner, (model(inputs) - targets).square().mean())
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all_finite(list(model.parameters()))


def linear_of(
    model: nn.Module, inputs: Tensor, dtype: torch.dtype, penalty: float, *, autocast: bool
) -> list[bool | None]:
    """Take one step, and say which layers took the gradient for that of the captured pairs."""
    preconditioner = KFAC(model, InverseFree())
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = nn.functional.cross_entropy(model(inputs).flatten(1), torch.arange(len(inputs)) % 4)
    loss = loss + penalty * sum(parameter.float().square().sum() for parameter in model.parameters())
    stepped(model, preconditioner, loss)
    return [layer.linear for layer in preconditioner._layers]


def network(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40)), 3 * torch.rand(6, 64)
    if kind == "conv":
        layers = [nn.Conv2d(3, 24, 3, stride=3), nn.ReLU(), nn.Conv2d(24, 20, 2, groups=2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(20, 40)), torch.rand(2, 3, 6, 6)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(3 * 32, 40)), torch.randn(4, 3, 32)


@pytest.mark.parametrize("kind", ["linear", "conv", "attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast", [True, False])
def test_rounding_in_half_precision_is_no_penalty(kind: str, dtype: torch.dtype, autocast: bool):
    model, inputs = network(kind)
    if not autocast:
        model, inputs = model.to(dtype), inputs.to(dtype)
    linear = linear_of(model, inputs, dtype, 0.0, autocast=autocast)
    assert True in linear
    assert False not in linear


@pytest.mark.parametrize(("kind", "penalty"), [("linear", 0.03), ("conv", 0.01), ("attention", 0.03)])
def test_a_penalty_is_seen_under_autocast(kind: str, penalty: float):
    """That of the weights as they start is a tenth of the gradient or so."""
    assert True not in linear_of(*network(kind), torch.bfloat16, penalty, autocast=True)


@every_system
def test_layers_of_two_precisions_are_solved_each_in_its_own(strategy: Strategy):
    model = nn.ModuleList([mlp(20, 20, dtype=torch.float32), mlp(20, 20)])
    preconditioner = KFAC(model, strategy)
    for seed in range(2):
        inputs, _ = batch(8, 20, 4, seed, torch.float32)
        assert all_finite(stepped(model, preconditioner, model[1](model[0](inputs).double()).square().mean()))


@every_system
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_default_dtype_changes_nothing(strategy: Strategy, dtype: torch.dtype):
    found = []
    for default in (torch.float64, torch.float32):
        model = mlp(10, 20, 4, dtype=dtype)
        torch.set_default_dtype(default)
        try:
            train(model, KFAC(model, strategy), [data(0, dtype), data(1, dtype)])
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(gradients(model))
    assert all(map(torch.equal, *found))


class WithComplex(nn.Module):
    """A layer that is preconditioned, and a complex one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.real = nn.Linear(10, 16)
        self.complex = nn.Linear(8, 4, dtype=torch.complex64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.complex(torch.view_as_complex(self.real(inputs).unflatten(-1, (8, 2)))).abs()


def test_complex_gradients_of_other_layers_are_looked_at():
    model = WithComplex()
    preconditioner = KFAC(model, Exact())
    train(model, preconditioner, [data(0), data(1)])
    assert preconditioner.report().skipped == 0
    loss_of(model, data(0)).backward()
    model.complex.bias.grad[0] = complex(0, float("nan"))
    preconditioner.step()
    assert preconditioner.report().skipped == 1
    assert not any(gradient.any() for gradient in gradients(model))


@every_system
@pytest.mark.parametrize("of_loss", [True, False])
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_steps_are_finite_at_every_scale(strategy: Strategy, scale: float, of_loss: bool):
    model = mlp(10, 40, 4, dtype=torch.float32)
    preconditioner = KFAC(model, strategy)
    for seed in range(2):
        inputs, labels = batch(4, 10, 4, seed, torch.float32)
        loss = loss_of(model, (inputs if of_loss else inputs * scale, labels))
        after = stepped(model, preconditioner, loss * scale if of_loss else loss)
    assert preconditioner.report().skipped == 0
    assert all_finite(after)
    assert any(bool(gradient.any()) for gradient in after)


def test_a_mask_of_nothing_is_finite():
    assert Mask.of([], nn.Linear(2, 2)).finite


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_keeps_every_bit_or_none(dtype: torch.dtype, finite: bool):
    """Where no look is free, rows and gradients are multiplied as integers: 0 times NaN is 0, and −0 times 1 is −0."""
    model = nn.Linear(4, 1, bias=False).to(dtype)
    model.weight.grad = torch.tensor([[math.nan, -0.0, -math.inf, 2.0]], dtype=dtype)
    before, mask = model.weight.grad.clone(), Mask(torch.tensor(finite), known_finite=False)
    indices, columns = torch.tensor([1, 0]), before.mT.float()
    masked = mask.rows({"any": Rows(indices, columns, 1), "single": Rows(columns, columns, 1, single=True)})
    mask.clear(model)
    found = [model.weight.grad, masked["any"].gradients.mT.to(dtype), masked["single"].inputs.mT.to(dtype)]
    wanted = before if finite else torch.zeros_like(before)
    for part in found:
        torch.testing.assert_close(part, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(part.signbit()[:, 1:], wanted.signbit()[:, 1:])
    assert masked["any"].inputs is indices
