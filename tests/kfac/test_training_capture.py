"""Capture where training is not one forward and one backward pass: checkpoints, failures, copies, functional calls."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brandla.kfac import KFAC, Exact
from kfac.networks import batch, gradients, layer_gradient, loss_of, mlp, stepped

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

EXACT = Exact(inverse_every=1)
CROSS_ENTROPY = nn.functional.cross_entropy
Forward = Callable[[nn.Sequential, Tensor], Tensor]


def plainly(model: nn.Sequential, inputs: Tensor) -> Tensor:
    return model(inputs)


def checkpointed(model: nn.Sequential, inputs: Tensor) -> Tensor:
    middle = checkpoint(model[:2], inputs, use_reentrant=False)
    return checkpoint(model[2:], middle, use_reentrant=False)


def reentrant(model: nn.Sequential, inputs: Tensor) -> Tensor:
    middle = checkpoint(model[:2], inputs.clone().requires_grad_(), use_reentrant=True)
    return checkpoint(model[2:], middle, use_reentrant=True)


def offloaded(model: nn.Sequential, inputs: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(inputs)


def steps(forward: Forward, count: int = 3) -> list[Tensor]:
    model = mlp(6, 8, 8, 4)
    preconditioner = KFAC(model, EXACT)
    for seed in range(count):
        inputs, labels = batch(10, 6, 4, seed)
        after = stepped(model, preconditioner, CROSS_ENTROPY(forward(model, inputs), labels))
    return after


@pytest.mark.parametrize("forward", [checkpointed, reentrant, offloaded])
def test_where_activations_are_kept_makes_no_difference(forward: Forward):
    torch.testing.assert_close(steps(forward), steps(plainly))


def test_inputs_are_dropped_where_a_checkpoint_drops_them():
    """Between forward and backward nothing holds the input of the second layer but what a checkpoint keeps."""
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT)
    seen: list[weakref.ref[Tensor]] = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0].untyped_storage())))
    inputs, labels = batch(10, 6, 4)
    loss = CROSS_ENTROPY(checkpoint(model, inputs, use_reentrant=False), labels)
    gc.collect()
    assert seen[0]() is None
    loss.backward()
    assert len(seen) == 2
    preconditioner.step()
    # The loss, and with it the graph, is still there.
    assert loss.grad_fn is not None
    assert preconditioner.report().captured_bytes == 8 * 10 * (6 + 8 + 8 + 4)
    assert preconditioner._layers[1].capture.bytes() == 0


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        message = "out of memory"
        raise RuntimeError(message)


@pytest.mark.parametrize("failure", ["forward", "backward", "given up", "curvature"])
@pytest.mark.parametrize("kind", ["empirical", "type-2"])
def test_a_step_that_failed_leaves_nothing_for_the_next(failure: str, kind: str):
    model, reference = mlp(6, 8, 8, 4), mlp(6, 8, 8, 4)
    preconditioner, expected = KFAC(model, EXACT, curvature=kind), KFAC(reference, EXACT, curvature=kind)
    inputs, labels = batch(10, 6, 4, 5)
    if failure == "forward":
        hidden = model[:3](inputs)
        with pytest.raises(RuntimeError, match="shapes"):
            model[3:](hidden[:, :3])
    else:
        hidden = model[:2](inputs)
        outputs = model[2:](hidden if failure == "given up" else Failing.apply(hidden))
        if failure == "curvature" and kind == "type-2":
            with pytest.raises(RuntimeError, match="out of memory"):
                preconditioner.curvature(outputs)
        elif failure == "given up":
            preconditioner.curvature(outputs)
            CROSS_ENTROPY(outputs, labels).backward()
        else:
            with pytest.raises(RuntimeError, match="out of memory"):
                CROSS_ENTROPY(outputs, labels).backward()
    model.zero_grad()
    inputs, labels = batch(10, 6, 4)
    for own, of in ((model, preconditioner), (reference, expected)):
        outputs = own(inputs)
        of.curvature(outputs)
        CROSS_ENTROPY(outputs, labels).backward()
        of.step()
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=0, atol=0)


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_copies_of_a_model_train_by_themselves(copied: Callable[[nn.Module], nn.Module]):
    model, reference, data = mlp(6, 8, 4), mlp(6, 8, 4), batch(10, 6, 4)
    preconditioner, expected = KFAC(model, EXACT), KFAC(reference, EXACT)
    twin = copied(model)
    loss_of(twin, data).backward()
    assert all(layer.capture.calls == [] for layer in preconditioner._layers)
    loss_of(model, data).backward()
    preconditioner.step()
    wanted = stepped(reference, expected, loss_of(reference, data))
    torch.testing.assert_close(gradients(model), wanted, rtol=0, atol=0)
    own = KFAC(twin, EXACT)
    torch.testing.assert_close(stepped(twin, own, loss_of(twin, data)), wanted, rtol=0, atol=0)


def test_weights_read_by_a_functional_call_are_said_not_to_be_seen():
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT)
    inputs, labels = batch(10, 6, 4)
    hidden = nn.functional.linear(inputs, model[0].weight, model[0].bias)
    CROSS_ENTROPY(model[1:](hidden), labels).backward()
    before = layer_gradient(model[0])
    with pytest.warns(UserWarning, match="none of the calls that made it was seen.*: 0$") as caught:
        preconditioner.step()
    assert caught[0].filename == __file__
    assert torch.equal(layer_gradient(model[0]), before)


def test_functional_calls_with_other_parameters_are_not_taken_for_the_models():
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT)
    inputs, labels = batch(10, 6, 4)
    other = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    loss = CROSS_ENTROPY(model(inputs), labels)
    torch.func.grad(lambda own: torch.func.functional_call(model, own, inputs).square().mean())(other)
    loss.backward()
    assert [len(layer.capture.calls) for layer in preconditioner._layers] == [1, 1]


def test_an_activation_that_overwrites_three_dimensions():
    """A Linear's output of three dimensions is a view, to which autograd gives another history there."""
    found = []
    for inplace in (True, False):
        model = mlp(6, 8, 4)
        model[1].inplace = inplace
        preconditioner = KFAC(model, EXACT)
        model(torch.ones(3, 5, 6, dtype=torch.float64)).square().mean().backward()
        assert [len(layer.capture.calls) for layer in preconditioner._layers] == [1, 1]
        preconditioner.step()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1])


def test_graphs_that_are_never_used_are_not_held():
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT, curvature="type-2")
    inputs, labels = batch(10, 6, 4)
    outputs = model(inputs)
    preconditioner.curvature(outputs)
    CROSS_ENTROPY(outputs, labels).backward()
    preconditioner.step()
    node = weakref.ref(outputs.grad_fn) if hasattr(outputs.grad_fn, "__weakref__") else None
    del outputs
    gc.collect()
    assert node is None or node() is None
    assert all(layer.capture.edges == [] for layer in preconditioner._layers)
