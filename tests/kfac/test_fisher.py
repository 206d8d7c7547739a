"""Curvature of the loss in the outputs, exact and drawn, and the scale that the number of terms gives the factors."""

import re
from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

from brandla.kfac import KFAC
from kfac.networks import EXACT, average, batch, gradients, loss_of, mlp, pooled, stepped

DOUBLE = torch.float64
LOSSES = {"cross_entropy": nn.functional.cross_entropy, "mse": nn.functional.mse_loss}


def targets(loss, outputs):
    return outputs.argmax(1) * 0 if loss == "cross_entropy" else torch.zeros_like(outputs)


def hessian_of_term(loss, outputs):
    """Return the Hessian of one term in its outputs."""
    return hessian(lambda row: LOSSES[loss](row[None], targets(loss, row[None])), outputs)


def curved_step(preconditioner, data, loss="cross_entropy", *, with_curvature=True):
    """Take a step, by default with a call of `curvature`; return the factors of gradients: G, or blocks of norms."""
    outputs = preconditioner._model(data[0])
    if with_curvature:
        preconditioner.curvature(outputs, loss=loss)
    stepped(preconditioner._model, preconditioner, LOSSES[loss](outputs, data[1]))
    sides = ["input" if layer.curvature.output is None else "output" for layer in preconditioner._layers]
    return [average(preconditioner, side, index) for index, side in enumerate(sides)]


@pytest.mark.parametrize("loss", LOSSES)
def test_drawn_factors_have_the_hessian_as_mean_at_the_rate_of_independent_draws(loss):
    """For n draws, E ‖mean − H‖² = E ‖s sᵀ − H‖² / n. By Markov's inequality, 25 times as much has probability 1/25."""
    layer = nn.Linear(2, 4, dtype=DOUBLE)
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=DOUBLE)
    layer.bias.data.copy_(logits)
    H = hessian_of_term(loss, logits)
    if loss == "cross_entropy":
        p = logits.softmax(0)
        columns = p[:, None] - torch.eye(4, dtype=DOUBLE)
        moments = sum(p[c] * (columns[:, c].outer(columns[:, c]) - H).square().sum() for c in range(4))
    else:
        # s = √(2/C) ε: E ‖s sᵀ‖² − ‖H‖² = (2/C)² (C(C + 2) − C)
        moments = torch.tensor((2 / 4) ** 2 * (4 * 6 - 4))
    for count in (100, 10_000):
        preconditioner = KFAC(layer, EXACT, curvature="monte-carlo", seed=3)
        data = torch.zeros(count, 2, dtype=DOUBLE), targets(loss, logits.expand(count, 4))
        error = (curved_step(preconditioner, data, loss)[0] - H).square().sum()
        assert 1 / 25 < error * count / moments < 25
        preconditioner.remove()


def test_only_the_captures_see_passes_for_the_curvature():
    model = mlp(5, 6, 4)
    preconditioner = KFAC(model, EXACT, curvature="type-2")
    inputs, accumulated = batch(7, 5, 4)[0].requires_grad_(), []
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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_positions_are_separate_terms_with_weights(flat, weighted, loss):
    """For outputs (N, C, T) of a Linear on (N, T, d), G is the weighted mean over all N T terms."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, dtype=DOUBLE)
    inputs = torch.randn(3, 6, 5, dtype=DOUBLE)
    weights = torch.arange(18).reshape(3, 6) % 3 / 2 if weighted else torch.ones(3, 6)
    preconditioner = KFAC(layer, EXACT, curvature="type-2")
    outputs = layer(inputs).flatten(0, 1) if flat else layer(inputs).mT
    shaped = weights.flatten() if flat else weights
    preconditioner.curvature(outputs, loss=loss, weights=shaped if weighted else None)
    stepped(layer, preconditioner, outputs.square().mean())
    terms = zip(weights.flatten(), layer(inputs).flatten(0, 1).detach(), strict=True)
    expected = sum(weight * hessian_of_term(loss, row) for weight, row in terms) / weights.sum()
    torch.testing.assert_close(average(preconditioner, "output"), expected)


def seen_passes(preconditioner, steps):
    """Return the vectors that the passes for the curvature send back from the outputs, step by step."""
    model, (inputs, labels), seen = preconditioner._model, batch(8, 5, 4), []
    for _ in range(steps):
        outputs, vectors = model(inputs), []
        outputs.register_hook(vectors.append)
        preconditioner.curvature(outputs)
        seen.append(list(vectors))
        stepped(model, preconditioner, nn.functional.cross_entropy(outputs, labels))
    return seen


def test_no_passes_if_no_factor_takes_data():
    preconditioner = KFAC(mlp(5, 6, 4), EXACT, curvature="type-2", factor_every=3)
    assert [len(vectors) for vectors in seen_passes(preconditioner, 5)] == [4, 0, 0, 4, 0]


def test_draws_differ_from_step_to_step_and_are_the_same_from_a_checkpoint():
    preconditioner, resumed = (KFAC(mlp(5, 6, 4), EXACT, curvature="monte-carlo", seed=5) for _ in range(2))
    (first,), (second,) = seen_passes(preconditioner, 2)
    assert not torch.equal(first, second)
    # These captures are discarded when the checkpoint is loaded.
    resumed.curvature(resumed._model(batch(8, 5, 4)[0]))
    resumed.load_state_dict(preconditioner.state_dict())
    expected, found = seen_passes(preconditioner, 3), seen_passes(resumed, 3)
    torch.testing.assert_close(expected, found, rtol=0, atol=0)
    torch.testing.assert_close(gradients(preconditioner._model), gradients(resumed._model), rtol=0, atol=0)


BAD = [
    ({"loss": "hinge"}, ValueError, "KFAC.curvature: loss must be 'cross_entropy' or 'mse'; got 'hinge'"),
    ({"weights": torch.ones(3)}, ValueError, "weights must be one for each term, (8,); got shape (3,)"),
    ({"outputs": torch.ones(8, 4)}, ValueError, "KFAC.curvature: outputs must be the model's, made with"),
    ({"outputs": torch.ones(8, 4).cfloat().requires_grad_()}, TypeError, "outputs must be real; got complex64"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=["loss", "weights", "graph", "dtype"])
def test_bad_arguments_are_refused_and_nothing_is_kept(arguments, error, message):
    """And the step without curvature is refused."""
    model, data = mlp(5, 6, 4), batch(8, 5, 4)
    preconditioner = KFAC(model, EXACT, curvature="type-2")
    with pytest.raises(error, match=re.escape(message)):
        preconditioner.curvature(**{"outputs": model(data[0]), **arguments})
    assert all(layer.capture.calls == [] for layer in preconditioner._layers)
    assert preconditioner._recorder.running == "loss"
    with pytest.raises(RuntimeError, match=r"KFAC.step: curvature='type-2' needs a call of .*got none"):
        stepped(model, preconditioner, loss_of(model, data))


# --- The number of terms of a loss: G from the loss's gradients is in expectation G from the model's labels


NETWORKS = {
    "linear": (lambda: pooled(nn.Linear(5, 4)), (2, 6, 5)),
    "more-dimensions": (lambda: pooled(nn.Linear(5, 4), nn.Flatten(1, 2)), (2, 2, 3, 5)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)), (2, 2, 3, 3)),
    "attention": (lambda: pooled(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)), (2, 5, 4)),
    "embedding": (lambda: pooled(nn.Embedding(7, 4)), (2, 5)),
    "scale": (lambda: pooled(nn.LayerNorm(4)), (2, 5, 4)),
}
# The output has a term at each of two positions, made of four positions of the first layer.
SEGMENTATION = (lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.Tanh(), nn.AvgPool1d(2), nn.Conv1d(4, 3, 1)), (1, 2, 4))
CASES = {
    **{f"{name}-{way}": (*case, way) for name, case in NETWORKS.items() for way in ("expand", "reduce")},
    "segmentation": (*SEGMENTATION, "expand"),
}


def drawn(shape, *, indices=False):
    torch.manual_seed(1)
    return torch.randint(7, shape) if indices else torch.randn(shape, dtype=DOUBLE)


@pytest.mark.parametrize(("make", "shape", "sharing"), CASES.values(), ids=CASES)
def test_the_mean_over_the_models_own_labels_is_the_exact_factor(make, shape, sharing):
    """The mean runs over all labels of two terms, weighted by their probabilities."""
    torch.manual_seed(0)
    model = make().double()
    inputs = drawn(shape, indices=isinstance(model[0], nn.Embedding))
    outputs = model(inputs).detach()
    p = outputs.softmax(1).movedim(1, -1).reshape(2, 3)
    found = {}
    for kind in ("type-2", "empirical"):
        preconditioner = KFAC(model, EXACT, curvature=kind, sharing=sharing, decay=0.0)
        weighted = []
        for labels in product(range(3), repeat=2):
            target = torch.tensor(labels).reshape(outputs.movedim(1, -1).shape[:-1])
            weight = p[0, labels[0]] * p[1, labels[1]]
            weighted.append([weight * own for own in curved_step(preconditioner, (inputs, target))])
        found[kind] = [sum(parts) for parts in zip(*weighted, strict=True)]
        preconditioner.remove()
    torch.testing.assert_close(found["empirical"], found["type-2"])


def test_without_curvature_each_use_is_a_term():
    """A layer with four positions a sample gets four times as much as with one term a sample; others get the same."""
    torch.manual_seed(0)
    model, data = NETWORKS["convolution"][0]().double(), (drawn((2, 2, 3, 3)), torch.tensor([0, 2]))
    by_term, by_use = (curved_step(KFAC(model, EXACT), data, with_curvature=given) for given in (True, False))
    torch.testing.assert_close(by_use, [4 * by_term[0], by_term[1]])


def test_a_number_of_terms_that_comes_too_late_is_refused():
    model = pooled(nn.Linear(5, 4))
    preconditioner = KFAC(model, EXACT)
    outputs = model(drawn((2, 6, 5)))
    outputs.square().mean().backward()
    preconditioner.curvature(outputs, loss="mse")
    with pytest.raises(RuntimeError, match=r"KFAC.step: curvature\(outputs\) was called after .*; call it before that"):
        preconditioner.step()
