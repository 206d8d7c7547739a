"""Curvature of the loss in the outputs: exact, drawn, and what it makes of the factors."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

from brandla.kfac import KFAC
from kfac.networks import EXACT, Batch, batch, gradients, loss_of, mlp, stepped

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

LOSSES = {"cross_entropy": nn.functional.cross_entropy, "mse": nn.functional.mse_loss}


def targets(loss: str, outputs: Tensor) -> Tensor:
    return outputs.argmax(1) * 0 if loss == "cross_entropy" else torch.zeros_like(outputs)


def factor(preconditioner: KFAC, layer: int, side: str) -> Tensor:
    state = getattr(preconditioner._layers[layer].curvature, side).state
    return state["dense"] / state["total"]


def hessian_of_one(loss: str, output: Tensor) -> Tensor:
    """Of one term, C outputs."""
    row = output[None]
    return hessian(lambda own: LOSSES[loss](own[None], targets(loss, row)), output)


def curved_step(model: nn.Module, preconditioner: KFAC, data: Batch, loss: str = "cross_entropy") -> list[Tensor]:
    """One step with the curvature of the loss in the outputs."""
    outputs = model(data[0])
    preconditioner.curvature(outputs, loss=loss)
    return stepped(model, preconditioner, LOSSES[loss](outputs, data[1]))


@pytest.mark.parametrize("loss", LOSSES)
def test_drawn_factors_have_the_hessian_as_mean_at_the_rate_of_independent_draws(loss: str):
    """Of n draws, E ‖mean − H‖² = E ‖s sᵀ − H‖² / n. By Markov's inequality 25 times as much has probability 1/25."""
    layer = nn.Linear(2, 4, dtype=torch.float64)
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)
    layer.bias.data.copy_(logits)
    H = hessian_of_one(loss, logits)
    if loss == "cross_entropy":
        p = logits.softmax(0)
        columns = p[:, None] - torch.eye(4, dtype=torch.float64)
        moments = sum(p[c] * (columns[:, c].outer(columns[:, c]) - H).square().sum() for c in range(4))
    else:
        # s = √(2/C) ε: E ‖s sᵀ‖² − ‖H‖² = (2/C)² (C(C + 2) − C)
        moments = torch.tensor((2 / 4) ** 2 * (4 * 6 - 4))
    for count in (100, 10_000):
        inputs = torch.zeros(count, 2, dtype=torch.float64)
        preconditioner = KFAC(layer, EXACT, curvature="monte-carlo", seed=3)
        curved_step(layer, preconditioner, (inputs, targets(loss, logits.expand(count, 4))), loss)
        error = (factor(preconditioner, 0, "output") - H).square().sum()
        assert 1 / 25 < error * count / moments < 25
        preconditioner.remove()


def jacobians(model: nn.Sequential, layer: int, inputs: Tensor) -> Tensor:
    """Derivative of the outputs by what a layer gives, (N, C, d_out)."""
    given = model[: layer + 1](inputs).detach()
    rest = model[layer + 1 :]
    return torch.stack([jacobian(lambda own: rest(own[None])[0], one) for one in given])


@pytest.mark.parametrize("loss", LOSSES)
def test_exact_factor_is_the_mean_of_transported_hessians(loss: str):
    model = mlp(5, 6, 4, 3)
    model[1].inplace = model[3].inplace = False
    inputs, _ = batch(7, 5, 3)
    preconditioner = KFAC(model, EXACT, curvature="type-2")
    outputs = model(inputs)
    curved_step(model, preconditioner, (inputs, targets(loss, outputs)), loss)
    for index, layer in enumerate((0, 2)):
        J = jacobians(model, layer, inputs)
        expected = torch.stack(
            [j.T @ hessian_of_one(loss, own) @ j for j, own in zip(J, outputs.detach(), strict=True)]
        )
        torch.testing.assert_close(factor(preconditioner, index, "output"), expected.mean(0))


def test_nothing_but_the_captures_sees_these_passes():
    model = mlp(5, 6, 4)
    preconditioner = KFAC(model, EXACT, curvature="type-2")
    inputs, _ = batch(7, 5, 4)
    inputs.requires_grad_()
    accumulated = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(accumulated.append)
    kept = torch.ones_like(model[0].weight)
    model[0].weight.grad = kept
    preconditioner.curvature(model(inputs))
    assert accumulated == []
    assert model[0].weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert inputs.grad is None
    assert model[2].weight.grad is None


@pytest.mark.parametrize("kind", ["monte-carlo", "type-2"])
def test_pairs_are_those_of_the_loss_and_factors_those_of_the_curvature(kind: str):
    inputs, labels = batch(3, 5, 4)
    steps = []
    for application in ("auto", "two-sided"):
        model = mlp(5, 6, 4)
        preconditioner = KFAC(model, EXACT, curvature=kind, application=application, clip=None)
        steps.append(curved_step(model, preconditioner, (inputs, labels)))
        assert all(layer.linear for layer in preconditioner._layers) == (application == "auto")
    torch.testing.assert_close(steps[0], steps[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_positions_are_terms_of_their_own_with_weights(flat: bool, weighted: bool, loss: str):
    """Outputs (N, C, T) of a Linear on (N, T, d): G is the mean over all N T terms, without those of weight 0."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, dtype=torch.float64)
    inputs = torch.randn(3, 6, 5, dtype=torch.float64)
    weights = torch.arange(18).reshape(3, 6) % 3 / 2 if weighted else torch.ones(3, 6)
    preconditioner = KFAC(layer, EXACT, curvature="type-2")
    outputs = layer(inputs).flatten(0, 1) if flat else layer(inputs).mT
    own = weights.flatten() if flat else weights
    preconditioner.curvature(outputs, loss=loss, weights=own if weighted else None)
    outputs.square().mean().backward()
    preconditioner.step()
    terms = zip(weights.flatten(), layer(inputs).flatten(0, 1).detach(), strict=True)
    expected = sum(weight * hessian_of_one(loss, own) for weight, own in terms) / weights.sum()
    torch.testing.assert_close(factor(preconditioner, 0, "output"), expected)


def test_no_passes_where_no_factor_takes_data():
    model = mlp(5, 6, 4)
    preconditioner = KFAC(model, EXACT, curvature="type-2", factor_every=3)
    inputs, labels = batch(8, 5, 4)
    counts = []
    for _ in range(5):
        model.zero_grad()
        outputs = model(inputs)
        passes: list[Tensor] = []
        outputs.register_hook(passes.append)
        preconditioner.curvature(outputs)
        counts.append(len(passes))
        LOSSES["cross_entropy"](outputs, labels).backward()
        preconditioner.step()
    assert counts == [4, 0, 0, 4, 0]


def test_draws_differ_from_step_to_step_and_are_the_same_from_a_checkpoint():
    inputs, labels = batch(8, 5, 4)

    def train(preconditioner: KFAC, steps: int) -> list[Tensor]:
        drawn = []
        for _ in range(steps):
            preconditioner._model.zero_grad()
            outputs = preconditioner._model(inputs)
            outputs.register_hook(drawn.append)
            preconditioner.curvature(outputs)
            LOSSES["cross_entropy"](outputs, labels).backward()
            preconditioner.step()
        return drawn[::2]

    model = mlp(5, 6, 4)
    preconditioner = KFAC(model, EXACT, curvature="monte-carlo", seed=5)
    first, second = train(preconditioner, 2)
    assert not torch.equal(first, second)
    resumed = KFAC(mlp(5, 6, 4), EXACT, curvature="monte-carlo", seed=5)
    # Given up for the checkpoint.
    resumed.curvature(resumed._model(inputs))
    resumed.load_state_dict(preconditioner.state_dict())
    expected, found = train(preconditioner, 3), train(resumed, 3)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    torch.testing.assert_close(gradients(model), gradients(resumed._model), rtol=0, atol=0)


def test_a_number_of_terms_that_is_that_of_the_uses_changes_nothing():
    one, other, data = mlp(5, 6, 4), mlp(5, 6, 4), batch(8, 5, 4)
    called = curved_step(one, KFAC(one, EXACT), data)
    without = stepped(other, KFAC(other, EXACT), loss_of(other, data))
    torch.testing.assert_close(called, without, rtol=0, atol=0)


def test_a_step_without_its_curvature_is_refused():
    model = mlp(5, 6, 4)
    preconditioner = KFAC(model, EXACT, curvature="monte-carlo")
    loss_of(model, batch(8, 5, 4)).backward()
    with pytest.raises(RuntimeError, match=r"KFAC.step: curvature='monte-carlo' needs a call of .*got none"):
        preconditioner.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "KFAC.curvature: loss must be 'cross_entropy' or 'mse'; got 'hinge'"),
        ({"weights": torch.ones(3)}, ValueError, "weights must be one for each term, (8,); got shape (3,)"),
        ({"outputs": torch.ones(8, 4)}, ValueError, "KFAC.curvature: outputs must be what the model gave"),
        (
            {"outputs": torch.ones(8, 4, dtype=torch.complex64, requires_grad=True)},
            TypeError,
            "KFAC.curvature: outputs must be real; got complex64",
        ),
    ],
    ids=["loss", "weights", "graph", "dtype"],
)
def test_bad_arguments_are_refused_and_nothing_is_kept(arguments: dict, error: type[Exception], message: str):
    model = mlp(5, 6, 4)
    preconditioner = KFAC(model, EXACT, curvature="type-2")
    inputs, _ = batch(8, 5, 4)
    with pytest.raises(error, match=re.escape(message)):
        preconditioner.curvature(**{"outputs": model(inputs), **arguments})
    assert all(layer.capture.calls == [] for layer in preconditioner._layers)
    assert preconditioner._recorder.running == "loss"
