"""What the hooks see: in-place activations, evaluation, accumulation, shared and unused modules, foreign gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Brand, Exact
from kfac.networks import Batch, batch, dense_step, gradients, layer_gradient, loss_of, mlp, stepped, with_one

# Small networks have factors too small for Brand; that they say so is tested with the report.
pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

DAMPING = 0.03
CROSS_ENTROPY = nn.functional.cross_entropy


def one_step(model: nn.Module, data: Batch, **options: object) -> list[torch.Tensor]:
    return stepped(model, KFAC(model, Exact(inverse_every=1), clip=None, **options), loss_of(model, data))


def test_in_place_activations_do_not_disturb_the_capture():
    in_place, plain = mlp(10, 20, 20, 4), mlp(10, 20, 20, 4)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    data = batch(12, 10, 4)
    torch.testing.assert_close(one_step(in_place, data), one_step(plain, data))


def test_linear_and_two_sided_application_agree():
    data = batch(12, 10, 4)
    linear, two_sided = mlp(10, 20, 20, 4), mlp(10, 20, 20, 4)
    torch.testing.assert_close(one_step(linear, data), one_step(two_sided, data, application="two-sided"))


def test_evaluation_without_grad_leaves_no_trace():
    model = mlp(10, 20, 4)
    inputs, labels = batch(12, 10, 4)
    expected = one_step(mlp(10, 20, 4), (inputs, labels))
    preconditioner = KFAC(model, Exact(inverse_every=1), clip=None)
    with torch.no_grad():
        model(inputs * 3)
    with torch.inference_mode():
        model(inputs * 2)
    CROSS_ENTROPY(model(inputs), labels).backward()
    with torch.no_grad():
        model(inputs * 5)
    preconditioner.step()
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize("application", ["auto", "two-sided"])
def test_accumulation_over_backward_passes_equals_one_pass_over_all(application: str):
    whole, parts = mlp(10, 20, 4), mlp(10, 20, 4)
    inputs, labels = batch(12, 10, 4)
    expected = one_step(whole, (inputs, labels), application=application)
    preconditioner = KFAC(parts, Exact(inverse_every=1), clip=None, application=application)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 12)):
        (CROSS_ENTROPY(parts(inputs[rows]), labels[rows], reduction="sum") / 12).backward()
    preconditioner.step()
    torch.testing.assert_close(gradients(parts), expected)


def test_shared_module_uses_the_data_of_every_call():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6, dtype=torch.float64)
    inputs = torch.randn(5, 6, dtype=torch.float64)
    preconditioner = KFAC(shared, Exact(inverse_every=1), clip=None, damping=DAMPING)
    first = shared(inputs)
    second = shared(torch.tanh(first))
    first.retain_grad()
    second.retain_grad()
    hidden = torch.tanh(first.detach())
    second.square().sum(1).mean().backward()
    expected = dense_step(
        with_one(torch.cat([inputs, hidden])), torch.cat([first.grad, second.grad]), layer_gradient(shared), DAMPING
    )
    preconditioner.step()
    torch.testing.assert_close(layer_gradient(shared), expected)


def test_modules_with_a_common_weight_are_one_layer():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    preconditioner = KFAC(model, Exact())
    model(torch.randn(4, 6)).square().mean().backward()
    preconditioner.step()
    report = preconditioner.report()
    assert {row.layer for row in report.factors} == {"0"}
    assert report.unsupported == {"2.bias": "its weight is that of 0, which has another bias"}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Linear(6, 3, dtype=torch.float64)
        self.unused = nn.Linear(6, 3, dtype=torch.float64)
        self.unread = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.unread(inputs)
        return self.used(inputs)


def test_modules_without_a_gradient_are_left_alone():
    model = Branches()
    preconditioner = KFAC(model, Exact())
    inputs, labels = batch(8, 6, 3)
    CROSS_ENTROPY(model(inputs), labels).backward()
    before = model.used.weight.grad.clone()
    preconditioner.step()
    assert model.unused.weight.grad is None
    assert model.unread.weight.grad is None
    assert not torch.equal(model.used.weight.grad, before)
    assert [row.reason for row in preconditioner.report().factors if row.layer != "used"] == ["no data yet"] * 4


def test_a_module_that_gets_its_first_gradient_late_starts_then():
    model = Branches()
    preconditioner = KFAC(model, Exact(inverse_every=3), factor_every=5)
    inputs, labels = batch(8, 6, 3)
    for forward in (model, model, model.unused):
        model.zero_grad()
        CROSS_ENTROPY(forward(inputs), labels).backward()
        before = gradients(model)
        preconditioner.step()
        assert not torch.equal(gradients(model)[0], before[0])


@pytest.mark.parametrize("change", ["penalty", "scaled", "replaced", "not-empty"])
def test_a_gradient_that_is_more_than_the_pair_is_applied_two_sided(change: str):
    """Whatever else is in the gradient reaches the step; the linear application would drop it."""
    results = []
    for application in ("auto", "two-sided"):
        model = mlp(10, 20, 4)
        preconditioner = KFAC(model, Exact(inverse_every=1), clip=None, application=application)
        inputs, labels = batch(12, 10, 4)
        if change == "not-empty":
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        loss = CROSS_ENTROPY(model(inputs), labels)
        if change == "penalty":
            loss = loss + 1e-3 * sum(parameter.square().sum() for parameter in model.parameters())
        loss.backward()
        for parameter in model.parameters():
            if change == "scaled":
                parameter.grad.mul_(0.25)
            if change == "replaced":
                parameter.grad = parameter.grad * 3
        preconditioner.step()
        results.append(gradients(model))
    torch.testing.assert_close(results[0], results[1])


def test_factors_are_updated_every_so_many_steps_only():
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, Brand(3), factor_every=3, application="two-sided")
    totals = []
    for seed in range(7):
        stepped(model, preconditioner, loss_of(model, batch(4, 10, 4, seed)))
        totals.append(preconditioner._layers[0].curvature.input.state["total"].item())
    once, twice, thrice = (1 - 0.95**count for count in (1, 2, 3))
    assert totals == pytest.approx([once] * 3 + [twice] * 3 + [thrice])


def test_keyword_and_single_vector_inputs():
    layer = nn.Linear(6, 3)
    preconditioner = KFAC(layer, Exact())
    layer(input=torch.randn(6)).square().mean().backward()
    preconditioner.step()
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_float32_factors(dtype: torch.dtype):
    layer = nn.Linear(20, 10).to(dtype)
    preconditioner = KFAC(layer, Brand(3))
    layer(torch.randn(4, 20, dtype=dtype)).float().square().mean().backward()
    preconditioner.step()
    entry = preconditioner.state_dict()["layers"]["(model)"]["curvature"]["input"]["state"]
    assert entry["root"].dtype == torch.float32
    assert layer.weight.grad.dtype == dtype
    assert torch.isfinite(layer.weight.grad).all()


def test_a_zero_gradient_stays_zero_and_finite():
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, Brand(3))
    (model(torch.randn(5, 10, dtype=torch.float64)) * 0).sum().backward()
    preconditioner.step()
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(model))
