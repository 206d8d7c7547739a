"""Capture where gradients go elsewhere, are thrown away, or models are copied, dropped, frozen, resized or shared."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brandla.kfac import EKFAC, KFAC, Exact, InverseFree, Strategy
from kfac.networks import batch, gradients, mlp

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

EXACT = Exact(inverse_every=1)
CROSS_ENTROPY = nn.functional.cross_entropy
Pass = Callable[[nn.Sequential, int, bool], None]


def loss_of(model: nn.Sequential, inputs: Tensor, seed: int) -> Tensor:
    return CROSS_ENTROPY(model(inputs), batch(10, 6, 4, seed)[1])


def data(seed: int) -> Tensor:
    return batch(10, 6, 4, seed)[0]


def abandoned(model: nn.Sequential) -> None:
    (50 * loss_of(model, data(100), 100)).backward()


def gradient_of_inputs(model: nn.Sequential, seed: int) -> None:
    inputs = data(seed).requires_grad_()
    torch.autograd.grad(50 * loss_of(model, inputs, seed), inputs)


def gradient_of_inputs_first(model: nn.Sequential, seed: int, disturbed: bool) -> None:
    model.zero_grad()
    if disturbed:
        gradient_of_inputs(model, seed)
    loss_of(model, data(seed), seed).backward()


def gradient_of_inputs_into_zeros(model: nn.Sequential, seed: int, disturbed: bool) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if disturbed:
        gradient_of_inputs(model, seed)
    loss_of(model, data(seed), seed).backward()


def gradient_of_inputs_through_the_same_graph(model: nn.Sequential, seed: int, disturbed: bool) -> None:
    model.zero_grad()
    inputs = data(seed).requires_grad_()
    loss = loss_of(model, inputs, seed)
    if disturbed:
        torch.autograd.grad(50 * loss, inputs, retain_graph=True)
    loss.backward()


def gradient_of_inputs_in_every_part(model: nn.Sequential, seed: int, disturbed: bool) -> None:
    model.zero_grad()
    for part in (seed, seed + 50):
        if disturbed:
            gradient_of_inputs(model, part)
        (loss_of(model, data(part), part) / 2).backward()


def adversarial(model: nn.Sequential, seed: int, disturbed: bool) -> None:
    """One backward pass through a graph that has given the direction of the second batch, and that batch's."""
    model.zero_grad()
    inputs = data(seed).requires_grad_()
    loss = loss_of(model, inputs, seed)
    if disturbed:
        (direction,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    else:
        plain = mlp(6, 8, 8, 4)
        plain.load_state_dict(model.state_dict())
        (direction,) = torch.autograd.grad(loss_of(plain, inputs, seed), inputs)
    (loss + loss_of(model, data(seed) + 0.1 * direction.sign(), seed)).backward()


def given_up_and_zeroed_after_the_forward_pass(model: nn.Sequential, seed: int, disturbed: bool) -> None:
    if disturbed:
        abandoned(model)
    loss = loss_of(model, data(seed), seed)
    model.zero_grad()
    loss.backward()


def given_up_between_forward_and_backward(model: nn.Sequential, seed: int, disturbed: bool) -> None:
    loss = loss_of(model, data(seed), seed)
    if disturbed:
        abandoned(model)
    model.zero_grad()
    loss.backward()


def given_up_through_the_same_graph(model: nn.Sequential, seed: int, disturbed: bool) -> None:
    loss = loss_of(model, data(seed), seed)
    if disturbed:
        (50 * loss).backward(retain_graph=True)
    model.zero_grad()
    loss.backward()


def given_up_in_checkpoints(model: nn.Sequential, seed: int, disturbed: bool) -> None:
    if disturbed:
        abandoned(model)
    inputs, labels = batch(10, 6, 4, seed)
    middle = checkpoint(model[:2], inputs.clone().requires_grad_(), use_reentrant=True)
    loss = CROSS_ENTROPY(checkpoint(model[2:], middle, use_reentrant=True), labels)
    model.zero_grad()
    loss.backward()


@pytest.mark.parametrize(
    "backward",
    [
        gradient_of_inputs_first,
        gradient_of_inputs_into_zeros,
        gradient_of_inputs_through_the_same_graph,
        gradient_of_inputs_in_every_part,
        adversarial,
        given_up_and_zeroed_after_the_forward_pass,
        given_up_between_forward_and_backward,
        given_up_through_the_same_graph,
        given_up_in_checkpoints,
    ],
)
def test_what_has_not_come_to_the_gradient_is_not_in_the_factors(backward: Pass):
    model, reference = mlp(6, 8, 8, 4), mlp(6, 8, 8, 4)
    preconditioner, expected = KFAC(model, EXACT), KFAC(reference, EXACT)
    for seed in range(3):
        backward(model, seed, True)
        preconditioner.step()
        backward(reference, seed, False)
        expected.step()
        torch.testing.assert_close(gradients(model), gradients(reference), rtol=0, atol=0)


@pytest.mark.parametrize("backward", [gradient_of_inputs_through_the_same_graph, given_up_between_forward_and_backward])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nor_is_it_where_the_model_is_compiled(backward: Pass):
    torch.compiler.reset()
    model, reference = mlp(6, 8, 4), mlp(6, 8, 4)
    preconditioner, expected = KFAC(model, EXACT), KFAC(reference, EXACT)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(2):
        # The compiler's own condition for a graph that is to be gone through more than once.
        with torch._functorch.config.patch(donated_buffer=False):
            backward(compiled, seed, True)
        preconditioner.step()
        backward(reference, seed, False)
        expected.step()
        torch.testing.assert_close(gradients(model), gradients(reference))


def through_one_graph_twice(model: nn.Sequential, halves: bool) -> None:
    loss = loss_of(model, data(0), 0)
    if halves:
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()
    else:
        (loss / 2 + loss / 2).backward()


def by_hand(model: nn.Sequential, halves: bool) -> None:
    loss = loss_of(model, data(0), 0)
    if halves:
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
            parameter.grad = gradient
    else:
        loss.backward()


def in_reentrant_checkpoints_of_one_weight(model: nn.Sequential, halves: bool) -> None:
    """Backward passes inside of one another add to the gradient of the middle layer, which is used twice."""
    hidden = model[:2](data(0))
    again = [checkpoint(model[2], hidden, use_reentrant=True) if halves else model[2](hidden) for _ in range(2)]
    CROSS_ENTROPY(model[3:](again[0] + again[1].tanh()), batch(10, 6, 4, 0)[1]).backward()


def test_one_graph_gone_through_twice_has_its_rows_twice():
    """N and the rows γ are those of two passes at half the gradient: A is the same, G is half."""
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT, application="two-sided")
    through_one_graph_twice(model, True)
    assert [len(layer.capture.calls[0].gradients["loss"]) for layer in preconditioner._layers] == [2, 2]
    preconditioner.step()
    factors = preconditioner.state_dict()["layers"]["0"]["curvature"]["input"]["state"]
    plain = KFAC(other := mlp(6, 8, 4), EXACT, application="two-sided")
    through_one_graph_twice(other, False)
    plain.step()
    assert factors["total"] == plain.state_dict()["layers"]["0"]["curvature"]["input"]["state"]["total"]


@pytest.mark.parametrize("backward", [by_hand, in_reentrant_checkpoints_of_one_weight])
def test_what_has_come_to_the_gradient_otherwise_is_in_the_factors(backward: Callable[[nn.Sequential, bool], None]):
    model, reference = mlp(6, 8, 8, 4), mlp(6, 8, 8, 4)
    for own, other in ((model, True), (reference, False)):
        preconditioner = KFAC(own, EXACT, application="two-sided")
        backward(own, other)
        preconditioner.step()
        assert all(layer.curvature.started for layer in preconditioner._layers)
    # Sums over the rows in another order, and the factors' inverses: condition 1/damping = 33 each.
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_curvature_of_a_step_that_was_given_up_is_forgotten_when_the_gradient_is(seed: int):
    """Also where the gradients become None only between `curvature` and the backward pass."""
    model, reference = mlp(6, 8, 4), mlp(6, 8, 4)
    preconditioner, expected = (KFAC(own, EXACT, curvature="type-2") for own in (model, reference))
    outputs = model(data(7) * 3)
    preconditioner.curvature(outputs)
    CROSS_ENTROPY(outputs, batch(10, 6, 4, 7)[1]).backward()
    for own, of in ((model, preconditioner), (reference, expected)):
        outputs = own(data(seed))
        of.curvature(outputs)
        own.zero_grad()
        CROSS_ENTROPY(outputs, batch(10, 6, 4, seed)[1]).backward()
        of.step()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=0, atol=0)


def test_a_gradient_zeroed_between_two_passes_is_not_the_pair():
    """Rows of the first pass stay, as the gradient was never None; the step is of the second one's gradient alone."""
    results = []
    for application in ("auto", "two-sided"):
        model = mlp(6, 30, 4)
        preconditioner = KFAC(model, EXACT, application=application, clip=None)
        for layer in preconditioner._layers:
            layer.linear = True
        for seed in range(2):
            model.zero_grad(set_to_none=False)
            inputs, labels = batch(1, 6, 4, seed)
            CROSS_ENTROPY(model(inputs), labels).backward()
        preconditioner.step()
        results.append(gradients(model))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("compiled", [False, True])
def test_functional_derivatives_in_the_inputs_leave_no_trace(compiled: bool):
    model, plain = mlp(6, 8, 4), mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT)
    derivative = torch.func.grad(lambda inputs: model(inputs).square().sum())
    expected = torch.func.grad(lambda inputs: plain(inputs).square().sum())(data(0))
    if compiled:
        torch.compiler.reset()
        derivative = torch.compile(derivative, backend="aot_eager")
    torch.testing.assert_close(derivative(data(0)), expected)
    torch.testing.assert_close(torch.func.jacrev(model)(data(0)[0]), torch.func.jacrev(plain)(data(0)[0]))
    _, pullback = torch.func.vjp(model, data(0))
    pullback(torch.ones(10, 4, dtype=torch.float64))
    reference = KFAC(plain, EXACT)
    for own, of in ((model, preconditioner), (plain, reference)):
        loss_of(own, data(1), 1).backward()
        of.step()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=0, atol=0)


def test_a_model_is_freed_with_its_preconditioner():
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT)
    loss_of(model, data(0), 0).backward()
    preconditioner.step()
    layer = weakref.ref(model[0])
    del model, preconditioner
    gc.collect()
    assert layer() is None


def test_weights_that_are_replaced_leave_no_hooks_behind():
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT)
    weights = []
    for seed in range(3):
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        weights.append(model[0].weight)
        loss_of(model, data(seed), seed).backward()
        preconditioner.step()
    assert [len(layer.capture._handles) for layer in preconditioner._layers] == [1, 1]
    hooks = [len(weight._post_accumulate_grad_hooks or ()) for weight in weights]
    assert hooks == [0, 0, 1]
    preconditioner.remove()
    assert not weights[-1]._post_accumulate_grad_hooks


class OneBias(nn.Module):
    """Two Linears, and two normalisations, with one bias each pair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))
        self.scale, self.other = (nn.BatchNorm1d(6, dtype=torch.float64) for _ in range(2))
        self.second.bias = self.first.bias
        self.other.bias = self.scale.bias

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.scale(self.first(inputs)).tanh()
        return self.other(self.second(hidden))


@pytest.mark.parametrize("training", [True, False])
def test_a_bias_of_two_layers_is_that_of_the_first(training: bool):
    found = []
    for inverse in (EXACT, {"": EXACT, "second": None, "other": None}):
        model = OneBias().train(training)
        preconditioner = KFAC(model, inverse, clip=None)
        CROSS_ENTROPY(model(data(0)), batch(10, 6, 6)[1]).backward()
        preconditioner.step()
        found.append((model, preconditioner.report().unsupported))
    (both, left), (alone, _) = found
    assert left == {"second.bias": "it is also that of first", "other.bias": "it is also that of scale"}
    for name in ("first", "scale"):
        own, other = getattr(both, name), getattr(alone, name)
        torch.testing.assert_close(own.weight.grad, other.weight.grad)
        torch.testing.assert_close(own.bias.grad, other.bias.grad)


@pytest.mark.parametrize("other", ["deepcopy", "pickle", "second"])
def test_attention_takes_another_preconditioner(other: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=torch.float64))
    inputs = torch.randn(3, 5, 8, dtype=torch.float64)
    first = KFAC(model, EXACT)
    make = {"deepcopy": copy.deepcopy, "pickle": lambda own: pickle.loads(pickle.dumps(own)), "second": lambda own: own}
    twin = make[other](model)
    second = KFAC(twin, EXACT)
    assert second.report().unsupported == first.report().unsupported == {}
    twin(inputs).square().mean().backward()
    assert all(layer.capture.calls for layer in second._layers)
    assert all(bool(layer.capture.calls) == (other == "second") for layer in first._layers)
    first.remove()
    second.step()
    assert all(layer.curvature.started for layer in second._layers)
    second.remove()
    if other == "second":
        assert "forward" not in vars(model[0].self_attn)


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_preconditioner_is_not_copied(how: Callable[[object], object]):
    preconditioner = KFAC(mlp(6, 8, 4), EXACT)
    with pytest.raises(TypeError, match=r"KFAC: it cannot be copied or pickled.*state_dict"):
        how(preconditioner)


@pytest.mark.parametrize("strategy", [EXACT, EKFAC(), InverseFree()])
def test_a_model_made_on_the_meta_device_gets_its_factors_where_it_goes(strategy: Strategy):
    with torch.device("meta"):
        model = mlp(6, 8, 4)
    preconditioner = KFAC(model, strategy)
    model.to_empty(device="cpu")
    reference = mlp(6, 8, 4)
    model.load_state_dict(reference.state_dict())
    expected = KFAC(reference, strategy)
    for own, of in ((model, preconditioner), (reference, expected)):
        loss_of(own, data(0), 0).backward()
        of.step()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=0, atol=0)


@pytest.mark.parametrize("given_up", [False, True])
@pytest.mark.parametrize("strategy", [EXACT, EKFAC(), InverseFree()])
def test_a_weight_of_another_size_starts_anew(strategy: Strategy, given_up: bool):
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, strategy, clip=None)
    loss_of(model, data(0), 0).backward()
    preconditioner.step()
    model.zero_grad()
    if given_up:
        abandoned(model)
        model.zero_grad()
    model[2].weight = nn.Parameter(torch.randn(5, 8, dtype=torch.float64))
    model[2].bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    fresh = copy.deepcopy(model)
    inputs, labels = batch(10, 6, 5, 1)
    # The first layer's output is the same: so is all that the last one sees.
    expected = KFAC(fresh, {"": None, "2": strategy}, clip=None)
    for own, of in ((model, preconditioner), (fresh, expected)):
        CROSS_ENTROPY(own(inputs), labels).backward()
        of.step()
    if strategy == EXACT:
        torch.testing.assert_close(model[2].weight.grad, fresh[2].weight.grad)
    assert preconditioner._layers[1].shape[:3] == ((), 5, 9)
    assert all(gradient.isfinite().all() for gradient in gradients(model))


def test_a_weight_that_freezes_before_the_backward_pass():
    """It gets no gradient, so that the pass does not count for it; no hook of ours asks it for one."""
    model, reference = mlp(6, 8, 4), mlp(6, 8, 4)
    for own in (model, reference):
        preconditioner = KFAC(own, EXACT, clip=None)
        if own is model:
            loss = loss_of(own, data(0) * 3, 0)
            own.requires_grad_(False)
            loss.backward()
            own.requires_grad_(True)
        loss_of(own, data(0), 0).backward()
        preconditioner.step()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=0, atol=0)


def test_a_layer_without_entries_is_left_to_the_optimizer():
    model = mlp(6, 8, 4)
    with pytest.warns(UserWarning, match="zero-element"):
        model.extend([nn.Linear(4, 0, dtype=torch.float64), nn.Linear(0, 3, dtype=torch.float64)])
    preconditioner = KFAC(model, EXACT)
    model(data(0)).square().sum().backward()
    preconditioner.step()
    assert preconditioner.report().unsupported == {"3": "its weight is empty", "4": "its weight is empty"}


def test_steps_after_remove_do_nothing():
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT)
    for removed in (False, True):
        model.zero_grad()
        loss_of(model, data(0), 0).backward()
        before = gradients(model)
        if removed:
            preconditioner.remove()
        preconditioner.step()
        same = [torch.equal(own, other) for own, other in zip(gradients(model), before, strict=True)]
        assert all(same) if removed else not any(same)
