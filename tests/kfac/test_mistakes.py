"""Mistakes of a training loop: each told once, and nothing is said of a loop that is right."""

import warnings

import pytest
import torch

from brandla.kfac import KFAC, Exact
from kfac.networks import batch, loss_of, mlp

STEPS = 13


def warned(loop):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop()
    return [str(warning.message) for warning in caught]


def loop(backward, *, late=False, zero=False, **options):
    """A training loop of a small network."""

    def run():
        model = mlp(10, 12, 4, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        preconditioner = KFAC(model, Exact(), **options)
        for step in range(STEPS):
            model.zero_grad()
            backward(model, step)
            if zero:
                model.zero_grad()
            for act in (optimizer.step, preconditioner.step) if late else (preconditioner.step, optimizer.step):
                act()

    return run


def loss(model, step):
    return loss_of(model, batch(32, 10, 4, step, torch.float32))


def plain(model, step):
    loss(model, step).backward()


def accumulated(model, step):
    for part in range(2):
        (loss(model, step + part) / 2).backward()


def summed(model, step):
    (32 * loss(model, step)).backward()


def scaled(model, step):
    """What a scaler does, and its unscale_, of which the preconditioner knows nothing."""
    (1024 * loss(model, step)).backward()
    for parameter in model.parameters():
        parameter.grad.data.div_(1024)


def of_derivatives(model, step):
    inputs = batch(32, 10, 4, step, torch.float32)[0].requires_grad_()
    outputs = model[2](model[0](inputs).tanh())
    (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    (outputs.square().mean() + 10 * (slope - 1).square().mean()).backward()


def broken(model, step):
    (loss(model, step) * (float("nan") if step > 1 else 1)).backward()


@pytest.mark.parametrize("backward", [plain, accumulated], ids=lambda own: str(own.__name__))
@pytest.mark.parametrize(
    "options",
    [{}, {"sharing": "reduce"}, {"gradient": "pair"}, {"application": "two-sided"}, {"factor_every": 4}],
    ids=str,
)
def test_nothing_is_told_of_a_loop_that_is_right(backward, options):
    assert warned(loop(backward, **options)) == []


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (loop(plain, late=True), "call preconditioner.step() before optimizer.step()"),
        (loop(plain, zero=True), "step() found no gradient 3 times in a row"),
        (loop(summed), "if the loss is a sum, divide it"),
        (loop(scaled), "what was captured is 1024 times the gradient"),
        (loop(of_derivatives), "only part of the gradient of 0"),
        (loop(broken), "a batch was skipped"),
    ],
    ids=["late", "nothing", "sum", "scaler", "derivatives", "not-finite"],
)
def test_a_mistake_is_told_once(run, message):
    (found,) = warned(run)
    assert found.startswith("KFAC: ")
    assert message in found


def test_two_preconditioners_of_one_model_are_told():
    model = mlp(10, 12, 4)
    first = KFAC(model, Exact())
    with pytest.warns(UserWarning, match="the model has hooks of another KFAC") as caught:
        KFAC(model[0], Exact())
    assert caught[0].filename == __file__
    first.remove()
    other = mlp(10, 12, 4)
    KFAC(other, Exact()).remove()
    assert warned(lambda: KFAC(other, Exact())) == []
