"""Autograd leaves gradients of weights out: steps equal those with gradients that it forms, or an error says why."""

import copy
import math

import pytest
import torch
from torch import nn

from brandla.kfac import EKFAC, KFAC, Brand, ConjugateGradient, Exact
from kfac.networks import batch, gradients, loss_of, mlp
from kfac.systems import SYSTEMS

WIDTHS = (40, 30, 30, 3)
# Few iterations of conjugate gradients: rounding grows from one to the next until they have converged.
STRATEGIES = {
    **{name: SYSTEMS[name] for name in ("exact", "ekfac", "singd", "foof", "two-level")},
    "brand": Brand(8),
    "conjugate-gradient": ConjugateGradient(iterations=3),
}


def loss(model, seed=0):
    return loss_of(model, batch(6, WIDTHS[0], WIDTHS[-1], seed))


def by_seed(backward):
    """Take three steps, each after a backward pass without earlier gradients."""

    def train(model, preconditioner):
        for seed in range(3):
            model.zero_grad()
            backward(model, preconditioner, seed)
            yield

    train.__name__ = backward.__name__
    return train


@by_seed
def plain(model, preconditioner, seed):
    loss(model, seed).backward()


@by_seed
def accumulated(model, preconditioner, seed):
    """Run two backward passes a step, after a pass whose gradients are thrown away."""
    loss(model, seed + 20).backward()
    model.zero_grad()
    loss(model, seed).backward()
    loss(model, seed + 10).backward()


@by_seed
def used_twice(model, preconditioner, seed):
    """Use a weight twice in one pass, on three dimensions: outputs are views, which activations overwrite."""
    hidden = model[:2](batch(6, WIDTHS[0], 3, seed)[0].reshape(3, 2, WIDTHS[0]))
    model[4](model[2:4](model[2:4](hidden))).square().mean().backward()


@by_seed
def penalised(model, preconditioner, seed):
    """Add a penalty on a weight, so that its gradient does not come from the calls alone."""
    (loss(model, seed) + model[0].weight.pow(4).sum()).backward()


def hooked(model, preconditioner):
    """Change the gradient of a weight by a hook."""
    model[2].weight.register_hook(lambda gradient: 2 * gradient)
    yield from plain(model, preconditioner)


def thawed(model, preconditioner):
    """Freeze a weight for some steps, and later its bias."""
    model[0].weight.requires_grad_(False)
    yield from plain(model, preconditioner)
    model[0].weight.requires_grad_(True)
    yield from plain(model, preconditioner)
    model[0].bias.requires_grad_(False)
    yield from plain(model, preconditioner)


def late(model, preconditioner):
    """Run each backward pass one step after its forward pass, on unchanged weights."""
    waiting = loss(model, 9)
    for seed in range(3):
        model.zero_grad()
        coming = loss(model, seed)
        waiting.backward()
        waiting = coming
        yield


@by_seed
def curved(model, preconditioner, seed):
    """Send passes for the curvature, too."""
    loss_of(model, batch(6, WIDTHS[0], WIDTHS[-1], seed), preconditioner).backward()


@by_seed
def padded(model, preconditioner, seed):
    """Let padding contribute to the loss: the gradient includes it, and the factors do not."""
    preconditioner.mask(torch.tensor([[1, 1], [1, 0], [1, 1]]))
    model(batch(6, WIDTHS[0], 3, seed)[0].reshape(3, 2, WIDTHS[0])).square().mean().backward()


OPTIONS = [
    {"clip_by": "kl"},
    {"clip_by": "spectral", "clip": 0.01},
    {"clip": None},
    {"factor_every": 2},
    {"sharing": "reduce"},
    {"inverse": {"": Brand(8), "0": None}},
]
CASES = [
    *((train, {"inverse": own}) for train in (plain, used_twice) for own in STRATEGIES.values()),
    *((train, {"inverse": STRATEGIES[own]}) for train in (accumulated, penalised) for own in ("exact", "brand")),
    *((train, {}) for train in (hooked, thawed, late, padded)),
    *((train, options) for train in (plain, used_twice) for options in OPTIONS),
    *((curved, {"curvature": own}) for own in ("monte-carlo", "type-2")),
]
PAIR, TWO_SIDED = {"gradient": "pair"}, {"application": "two-sided"}


@pytest.mark.parametrize(("train", "options"), CASES, ids=lambda own: getattr(own, "__name__", str(own)))
def test_steps_are_the_same_whoever_forms_the_gradient_and_however_factors_are_applied(train, options):
    found = []
    for way in ({}, PAIR, TWO_SIDED, PAIR | TWO_SIDED):
        found.append([])
        model = mlp(*WIDTHS)
        preconditioner = KFAC(model, **{"inverse": Brand(8), **options, **way})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in train(model, preconditioner):
            preconditioner.step()
            found[-1].append(gradients(model))
            if train is not late:
                optimizer.step()
    # In directions without data, rounding decides a renewed eigenbasis.
    compared = 1 if isinstance(options.get("inverse"), EKFAC) else None
    for others in found[1:]:
        # The same products are summed in another order. After a solve with λ = 0.03 they agree to 1e-9.
        torch.testing.assert_close(others[:compared], found[0][:compared], rtol=1e-7, atol=1e-9)


def test_autograd_forms_no_gradient_of_a_weight_with_a_bias():
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 10, bias=False), nn.Linear(10, 8), nn.LayerNorm(8))
    preconditioner = KFAC(model, Brand(2), gradient="pair")
    model(torch.randn(3, 20)).sum().backward()
    assert [layer.weight.grad is None for layer in model] == [True, False, True, False]
    assert all(parameter.requires_grad for parameter in model.parameters())
    preconditioner.step()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_step_without_gradients_does_nothing():
    model = mlp(20, 10)
    preconditioner = KFAC(model, Exact(), gradient="pair")
    inputs = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(model(inputs).sum(), inputs)
    preconditioner.step()
    model(inputs).sum().backward()
    model.zero_grad()
    preconditioner.step()
    assert gradients(model) == []


@pytest.mark.filterwarnings("ignore:KFAC. a batch was skipped")
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("factor_every", [1, 2])
def test_a_batch_that_is_not_finite_gives_no_step(bad, factor_every):
    """Also if only an input is non-finite, its output gets no gradient, and the factors take no data in this step."""
    model = mlp(40, 30, dtype=torch.float32)
    preconditioner = KFAC(model, Brand(4), gradient="pair", factor_every=factor_every)
    for step in range(2):
        model.zero_grad()
        inputs = torch.randn(3, 40)
        if step == 1:
            inputs[0, 0] = bad
        model(inputs)[1:].sum().backward()
        preconditioner.step()
    assert all(not gradient.any() for gradient in gradients(model))
    assert preconditioner.report().skipped == 1


def test_weights_are_trained_in_a_copy_after_a_failed_call_and_after_remove():
    model = mlp(20, 10)
    inputs = torch.randn(3, 20, dtype=torch.float64)
    preconditioner = KFAC(model, Exact(), gradient="pair")
    with pytest.raises(RuntimeError):
        model(inputs[:, :5])
    assert model[0].weight.requires_grad
    plain = copy.deepcopy(model)
    preconditioner.remove()
    for own in (plain, model):
        own(inputs).sum().backward()
        assert own[0].weight.grad is not None


@pytest.mark.parametrize("change", ["zeroed", "clipped", "kept"])
def test_gradients_that_are_changed_outside_raise(change):
    model = mlp(*WIDTHS)
    preconditioner = KFAC(model, Exact(), gradient="pair")
    loss(model).backward()
    preconditioner.step()
    if change != "kept":
        model.zero_grad(set_to_none=change == "clipped")
    loss(model).backward()
    if change == "clipped":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match=r"gradient='pair': the gradient of 0\.weight .* set_to_none=True"):
        preconditioner.step()


def test_a_call_that_cannot_be_captured_raises_if_its_gradient_is_left_out():
    model = nn.Linear(20, 10)
    model.register_forward_hook(lambda module, args, output: output.sum(-1), prepend=True)
    preconditioner = KFAC(model, Exact(), gradient="pair")
    with pytest.raises(RuntimeError, match="gradient must be 'autograd' for this Linear: its output has shape"):
        model(torch.randn(3, 20))
    preconditioner.remove()
