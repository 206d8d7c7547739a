"""Steps in training: non-finite batches, schedules, frozen layers, loss scales and precisions."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from brandla.kfac import KBFGS, KFAC, Exact, Foof, InverseFree
from brandla.kfac.capture.finite import FiniteCheck
from brandla.kfac.values import Rows
from kfac.networks import EXACT, assert_near, batch, gradients, loss_of, mlp, stepped, train
from kfac.systems import every_system, factors_of, tensors

pytestmark = pytest.mark.filterwarnings("ignore:KFAC. a batch was skipped")
on_host_and_device = pytest.mark.parametrize("reads_are_free", [True, False], ids=["host", "device"])


def step_on(model, preconditioner, seed):
    return stepped(model, preconditioner, loss_of(model, batch(8, 10, 4, seed)))


def broken_backward(model, seed, fault):
    """Run a backward pass with values beyond the range of float32, or with values whose squares are."""
    inputs, labels = batch(8, 60, 4, seed, torch.float32)
    if fault == "input":
        inputs[:, 2] = math.nan
    if fault == "inputs squared":
        inputs *= 1e20
    ({"loss": math.inf, "loss squared": 1e22}.get(fault, 1) * loss_of(model, (inputs, labels))).backward()
    if fault == "gradient":
        model[-1].weight.grad[0, 0] = math.inf


def curvature_of(preconditioner):
    """Return M of the factors, or else all tensors: sums decay with their totals, and bases may rotate, but M stays."""
    factors = factors_of(preconditioner)
    found = [own.form.average(own.state) if "dense" in own.state else own.operand().dense() for own in factors]
    return found or tensors(preconditioner)


@on_host_and_device
@every_system
def test_non_finite_batches_change_nothing(strategy, reads_are_free, monkeypatch):
    """The very first batch may be one. The device case takes the code that reads nothing back."""
    monkeypatch.setattr("brandla.kfac.capture.finite.reads_are_free", lambda tensor: reads_are_free)
    model = mlp(60, 50, 4, dtype=torch.float32)
    preconditioner = KFAC(model, strategy)
    faults = ["input", "", "loss", "", "gradient", "loss squared", "", "inputs squared", "input", ""]
    for seed, fault in enumerate(faults):
        before = curvature_of(preconditioner) if seed else []
        model.zero_grad()
        broken_backward(model, seed, fault)
        preconditioner.step()
        assert all(torch.isfinite(gradient).all() for gradient in gradients(model))
        assert all(bool(gradient.any()) == (not fault) for gradient in gradients(model))
        if fault and seed > 6 and not isinstance(strategy, KBFGS):
            # Brand rotates or polishes its columns; kept rows stay to the bit. K-BFGS keeps sums, which decay.
            rounding = 16 * torch.finfo(torch.float32).eps if factors_of(preconditioner) else 0
            for one, other in zip(curvature_of(preconditioner), before, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=rounding * float(other.abs().max()))
    assert preconditioner.report().skipped == 6
    assert all(torch.isfinite(part).all() for part in tensors(preconditioner))


@pytest.mark.parametrize(
    ("other", "inputs"),
    [
        (nn.Linear(10, 2, dtype=torch.complex64), torch.randn(5, 10, dtype=torch.complex64)),
        (nn.Embedding(6, 2, sparse=True), torch.tensor([1, 2, 1])),
    ],
    ids=["complex", "sparse"],
)
def test_gradients_of_other_layers_are_checked(other, inputs):
    model = nn.Sequential(other, nn.Linear(2, 4))
    preconditioner = KFAC(model, Exact())
    for skipped in (0, 1):
        model.zero_grad()
        model[1](other(inputs).abs()).square().sum().backward()
        if skipped:
            grad = other.weight.grad
            (grad._values() if grad.is_sparse else torch.view_as_real(grad))[..., 1] = math.nan
        preconditioner.step()
        assert preconditioner.report().skipped == skipped
        found = [part.to_dense() if part.is_sparse else part for part in gradients(model)]
        assert all(bool(part.abs().sum()) == (not skipped) for part in found)
    assert other.weight.grad.is_sparse == isinstance(other, nn.Embedding)


def test_a_mask_without_rows_is_finite():
    assert FiniteCheck.of([], nn.Linear(2, 2)).finite


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mask_keeps_every_bit_or_none(dtype, finite):
    """On a device, rows and gradients are multiplied as integers: 0 times NaN is 0, and −0 times 1 is −0."""
    model = nn.Linear(4, 1, bias=False).to(dtype)
    model.weight.grad = torch.tensor([[math.nan, -0.0, -math.inf, 2.0]], dtype=dtype)
    before, mask = model.weight.grad.clone(), FiniteCheck(torch.tensor(finite), known_finite=False)
    indices, columns = torch.tensor([1, 0]), before.mT.float()
    masked = mask.rows({"any": Rows(indices, columns, 1), "single": Rows(columns, columns, 1, single=True)})
    mask.clear(model)
    found = [model.weight.grad, masked["any"].gradients.mT.to(dtype), masked["single"].inputs.mT.to(dtype)]
    wanted = before if finite else torch.zeros_like(before)
    for part in found:
        torch.testing.assert_close(part, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(part.signbit()[:, 1:], wanted.signbit()[:, 1:])
    assert masked["any"].inputs is indices


@every_system
@pytest.mark.parametrize("of_loss", [True, False])
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_steps_are_finite_at_every_scale(strategy, scale, of_loss):
    model = mlp(10, 40, 4, dtype=torch.float32)
    preconditioner = KFAC(model, strategy)
    for seed in range(2):
        inputs, labels = batch(4, 10, 4, seed, torch.float32)
        loss = loss_of(model, (inputs if of_loss else inputs * scale, labels))
        found = stepped(model, preconditioner, loss * scale if of_loss else loss)
    assert preconditioner.report().skipped == 0
    assert all(part.isfinite().all() for part in found)
    assert any(part.any() for part in found)


@every_system
@pytest.mark.parametrize("of_loss", [True, False])
def test_with_relative_damping_steps_are_inverse_to_the_scale_of_data(strategy, of_loss):
    """The scale is that of the inputs or of the loss; systems without G do not follow the scale of the loss."""
    found, scale = [], 2.0**10
    for factor in (1.0, scale):
        layer = mlp(60, 50, bias=False)[0]
        nn.init.zeros_(layer.weight)
        preconditioner = KFAC(layer, strategy, clip=None)
        for seed in range(4):
            inputs, labels = batch(8, 60, 50, seed)
            loss = loss_of(layer, (inputs if of_loss else factor * inputs, labels))
            (step,) = stepped(layer, preconditioner, factor * loss if of_loss else loss)
        found.append(step)
    has_no_G = of_loss and isinstance(strategy, Foof | KBFGS)
    assert_near(found[1], found[0] * (scale if has_no_G else 1 / scale), 1e-9)


def test_layers_that_are_frozen_or_added_later_are_left_alone():
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, EXACT)
    step_on(model, preconditioner, 0)
    model[0].requires_grad_(False)
    model.append(nn.Linear(4, 4, dtype=torch.float64))
    first = preconditioner._layers[0].curvature
    before = [part.clone() for part in first.tensors()]
    loss = loss_of(model, batch(8, 10, 4))
    expected = torch.autograd.grad(loss, list(model[-1].parameters()), retain_graph=True)
    found = stepped(model, preconditioner, loss)
    assert model[0].weight.grad is None
    assert all(map(torch.equal, first.tensors(), before))
    assert all(map(torch.equal, found[-2:], expected))


def test_schedules_are_functions_of_the_step():
    asked = {}

    def schedule(name, values):
        return lambda step: (asked.setdefault(name, []).append(step), values[step % len(values)])[1]

    values = {"damping": [0.1, 0.2, 0.3], "clip": [None, 1e-3, 1e-2], "decay": [0.9, 0.5, 0.7], "factor_every": [1] * 3}
    model, reference = mlp(10, 20, 4), mlp(10, 20, 4)
    scheduled = KFAC(model, EXACT, **{name: schedule(name, own) for name, own in values.items()})
    fixed = KFAC(reference, EXACT)
    for index in range(3):
        for name, own in values.items():
            object.__setattr__(fixed.options, name, own[index])
        found, expected = step_on(model, scheduled, index), step_on(reference, fixed, index)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert asked.keys() == values.keys()
    assert set(asked["damping"]) == {0, 1, 2, 3}


@on_host_and_device
def test_a_second_step_with_no_new_gradient_does_nothing(reads_are_free, monkeypatch):
    monkeypatch.setattr("brandla.kfac.capture.finite.reads_are_free", lambda tensor: reads_are_free)
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, EXACT)
    once = step_on(model, preconditioner, 0)
    preconditioner.step()
    torch.testing.assert_close(gradients(model), once, rtol=0, atol=0)
    assert not torch.equal(step_on(model, preconditioner, 1)[0], once[0])


# --- Precision: autocast, loss scaling, models in half or mixed precision


def one_step(scaler, parts, **options):
    model = mlp(10, 32, 32, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = KFAC(model, EXACT, scaler=scaler, damping=1.0, clip=None, **options)
    # With four samples the pair is cheaper in every layer.
    inputs, labels = batch(4, 10, 4, dtype=torch.float32)
    for rows in torch.arange(4).chunk(parts):
        loss = loss_of(model, (inputs[rows], labels[rows]), preconditioner) / parts
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    preconditioner.step()
    return preconditioner, gradients(model)


@pytest.mark.parametrize("curvature", ["empirical", "type-2"])
@pytest.mark.parametrize("way", [{}, {"application": "two-sided"}, {"gradient": "pair"}], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_scale_changes_nothing(way, parts, curvature, monkeypatch):
    """A scale that is a power of two causes no rounding. It is never read back."""
    options = {"parts": parts, "curvature": curvature, **way}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    monkeypatch.setattr(scaler, "get_scale", lambda: pytest.fail("a read-back"))
    preconditioner, found = one_step(scaler, **options)
    expected = one_step(None, **options)[1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    disabled = one_step(torch.amp.GradScaler("cpu", enabled=False), **options)[1]
    torch.testing.assert_close(disabled, expected, rtol=0, atol=0)
    # Unscaling is recognised as the only change of the gradient. A left-out gradient is not checked.
    assert [layer.gradient_is_pair for layer in preconditioner._layers] == [None if way else True] * 3


def test_gradients_that_are_still_scaled_are_refused_and_a_batch_that_overflows_is_skipped_by_all():
    """At a scale of 2^30 a float16 gradient is infinite: weights stay, and the scale is halved."""
    model = mlp(10, 32, 32, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    preconditioner = KFAC(model, EXACT, scaler=scaler)
    for seed, scale, skipped in ((0, 2.0**10, 0), (1, 2.0**30, 1), (2, 2.0**10, 1)):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        if seed:
            scaler.update(scale)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch(16, 10, 4, seed, dtype=torch.float32))
        scaler.scale(loss).backward()
        with pytest.raises(RuntimeError, match=r"KFAC.step: .*call scaler.unscale_\(optimizer\) between"):
            preconditioner.step()
        scaler.unscale_(optimizer)
        preconditioner.step()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if seed == 1 else scale)
        assert preconditioner.report().skipped == skipped
        assert all(map(torch.equal, model.parameters(), before)) == (seed == 1)


# Factors of the squared weights: the penalty's gradient is about a tenth of the loss's at the start.
PENALTIES = {"linear": 0.03, "conv": 0.01, "attention": 0.03}
ROUNDED = [
    *((*case, 0.0) for case in product(PENALTIES, (torch.bfloat16, torch.float16), (True, False))),
    *((kind, torch.bfloat16, True, penalty) for kind, penalty in PENALTIES.items()),
]


@pytest.mark.parametrize(("kind", "dtype", "autocast", "penalty"), ROUNDED)
def test_a_penalty_is_detected_and_rounding_in_half_precision_is_no_penalty(kind, dtype, autocast, penalty):
    """A layer shows it by whether it takes the gradient for the product of the captured pair."""
    torch.manual_seed(0)
    if kind == "linear":
        model, inputs = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40)), 3 * torch.rand(6, 64)
    elif kind == "conv":
        layers = [nn.Conv2d(3, 24, 3, stride=3), nn.ReLU(), nn.Conv2d(24, 20, 2, groups=2), nn.Flatten()]
        model, inputs = nn.Sequential(*layers, nn.Linear(20, 40)), torch.rand(2, 3, 6, 6)
    else:
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        model, inputs = nn.Sequential(layer, nn.Flatten(), nn.Linear(3 * 32, 40)), torch.randn(4, 3, 32)
    if not autocast:
        model, inputs = model.to(dtype), inputs.to(dtype)
    preconditioner = KFAC(model, InverseFree())
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss = nn.functional.cross_entropy(model(inputs).flatten(1), torch.arange(len(inputs)) % 4)
    loss = loss + penalty * sum(parameter.float().square().sum() for parameter in model.parameters())
    stepped(model, preconditioner, loss)
    linear = [layer.gradient_is_pair for layer in preconditioner._layers]
    assert (True in linear) == (not penalty)
    assert penalty or False not in linear


@every_system
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_default_dtype_changes_nothing(strategy, dtype):
    found = []
    for default in (torch.float64, torch.float32):
        model = mlp(10, 20, 4, dtype=dtype)
        torch.set_default_dtype(default)
        try:
            train(model, KFAC(model, strategy), [batch(8, 10, 4, seed, dtype) for seed in range(2)])
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(gradients(model))
    assert all(map(torch.equal, *found))


@every_system
def test_each_layer_is_solved_in_its_own_precision_which_may_change(strategy):
    """In half precision the factors are in float32."""
    model = nn.ModuleList([mlp(10, 40, 40), mlp(40, 4)])
    preconditioner = KFAC(model, strategy)
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.float64)):
        for part, dtype in zip(model, dtypes, strict=True):
            part.to(dtype)
        inputs, labels = batch(8, 10, 4, dtype=dtypes[0])
        outputs = model[1](model[0](inputs).to(dtypes[1]))
        found = stepped(model, preconditioner, nn.functional.cross_entropy(outputs, labels))
        assert all(part.isfinite().all() for part in found)
        assert [part.dtype for part in found] == [dtypes[0]] * 4 + [dtypes[1]] * 2
        for layer, dtype in zip(preconditioner._layers, dtypes[:1] + dtypes, strict=True):
            own = torch.promote_types(dtype, torch.float32)
            assert {part.dtype for part in layer.curvature.tensors()} <= {own, torch.float64}
