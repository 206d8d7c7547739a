"""Models under K-FAC are copied, dropped, frozen, resized or moved, and their weights are shared or replaced."""

import copy
import gc
import pickle
from functools import partial
from weakref import ref

import pytest
import torch
from torch import nn

from brandla.kfac import EKFAC, KFAC, InverseFree
from kfac.networks import EXACT, Router, batch, encoder, gradients, loss_of, mlp, stepped, through_a_file

STRATEGIES = pytest.mark.parametrize("strategy", [EXACT, EKFAC(), InverseFree()], ids=["exact", "ekfac", "singd"])
data = partial(batch, 10, 6, 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, partial(through_a_file, weights_only=False)])
@pytest.mark.parametrize("make", [partial(mlp, 6, 8, 4), encoder], ids=["mlp", "encoder"])
def test_copies_of_a_model_train_by_themselves(make, copied):
    model, reference = make(), make()
    preconditioner, expected = KFAC(model, EXACT), KFAC(reference, EXACT)
    twin = copied(model)
    loss_of(twin, data()).backward()
    assert all(layer.capture.calls == [] for layer in preconditioner._layers)
    wanted = stepped(reference, expected, loss_of(reference, data()))
    for own, of in ((model, preconditioner), (twin, KFAC(twin, EXACT))):
        torch.testing.assert_close(stepped(own, of, loss_of(own, data())), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_preconditioner_is_not_copied(how):
    with pytest.raises(TypeError, match=r"KFAC: it cannot be copied or pickled.*state_dict"):
        how(KFAC(mlp(6, 8, 4), EXACT))


def test_a_second_preconditioner_warns_and_captures_beside_the_first_and_after_it():
    model = encoder()
    first = KFAC(model, EXACT)
    with pytest.warns(UserWarning, match="the model has hooks of another KFAC") as caught:
        second = KFAC(model[0], EXACT)
    assert caught[0].filename == __file__
    loss_of(model, data()).backward()
    assert all(layer.capture.calls for layer in first._layers + second._layers)
    first.remove()
    second.step()
    assert all(layer.curvature.started for layer in second._layers)
    second.remove()
    assert "forward" not in vars(model[0].self_attn)
    # A warning would be an error.
    KFAC(model, EXACT)


def test_a_preconditioner_that_is_dropped_takes_its_hooks_along_and_a_model_goes_with_it():
    gc.disable()
    try:
        model = nn.Sequential(*mlp(4, 3, 3), Router(4, 3), nn.MultiheadAttention(4, 2))
        preconditioner = KFAC(model, EXACT)
        model[:3](torch.randn(5, 4, dtype=torch.float64)).sum().backward()
        gone = [ref(preconditioner), ref(preconditioner._layers[0].capture.calls[0].inputs)]
        del preconditioner
        assert [part() for part in gone] == [None, None]
        assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
        assert not any(part._post_accumulate_grad_hooks for part in model.parameters())
    finally:
        gc.enable()
    preconditioner, first = KFAC(model, EXACT), ref(model[0])
    model[:3](torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    preconditioner.step()
    del model, preconditioner
    gc.collect()
    assert first() is None


def test_weights_that_are_replaced_leave_no_hooks_behind():
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT)
    weights = []
    for seed in range(3):
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        weights.append(model[0].weight)
        stepped(model, preconditioner, loss_of(model, data(seed)))
    assert [len(layer.capture._handles) for layer in preconditioner._layers] == [1, 1]
    assert [len(weight._post_accumulate_grad_hooks or ()) for weight in weights] == [0, 0, 1]
    preconditioner.remove()
    assert not weights[-1]._post_accumulate_grad_hooks
    # A step does nothing from now on.
    loss_of(model, data()).backward()
    before = gradients(model)
    preconditioner.step()
    torch.testing.assert_close(gradients(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_a_bias_of_two_layers_is_that_of_the_first(training):
    """Both for two Linears and for two normalisations."""
    found = []
    for inverse in (EXACT, {"": EXACT, "3": None, "4": None}):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6)]
        layers[3].bias, layers[4].bias = layers[0].bias, layers[1].bias
        model = nn.Sequential(*layers).double().train(training)
        preconditioner = KFAC(model, inverse, clip=None)
        stepped(model, preconditioner, loss_of(model, batch(10, 6, 6)))
        found.append((model, preconditioner.report().unsupported))
    (both, left), (alone, _) = found
    assert left == {"3.bias": "it belongs to 0", "4.bias": "it belongs to 1"}
    torch.testing.assert_close(gradients(both[:2]), gradients(alone[:2]))


@STRATEGIES
def test_a_model_made_on_the_meta_device_gets_its_factors_where_it_goes(strategy):
    with torch.device("meta"):
        model = mlp(6, 8, 4)
    preconditioner = KFAC(model, strategy)
    model.to_empty(device="cpu")
    reference = mlp(6, 8, 4)
    model.load_state_dict(reference.state_dict())
    found = stepped(model, preconditioner, loss_of(model, data()))
    expected = stepped(reference, KFAC(reference, strategy), loss_of(reference, data()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("given_up", [False, True])
@STRATEGIES
def test_a_weight_of_another_size_starts_anew(strategy, given_up):
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, strategy, clip=None)
    stepped(model, preconditioner, loss_of(model, data()))
    model.zero_grad()
    if given_up:
        (50 * loss_of(model, data(100))).backward()
        model.zero_grad()
    model[2].weight = nn.Parameter(torch.randn(5, 8, dtype=torch.float64))
    model[2].bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    fresh = copy.deepcopy(model)
    found = stepped(model, preconditioner, loss_of(model, batch(10, 6, 5, 1)))
    # The first layer's output is the same, so the last layer captures the same.
    expected = stepped(fresh, KFAC(fresh, {"": None, "2": strategy}, clip=None), loss_of(fresh, batch(10, 6, 5, 1)))
    if strategy == EXACT:
        torch.testing.assert_close(found[2:], expected[2:])
    assert preconditioner._layers[1].shape[:3] == ((), 5, 9)
    assert all(gradient.isfinite().all() for gradient in found)
