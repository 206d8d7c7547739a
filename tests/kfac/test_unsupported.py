"""Left to the optimizer: unknown modules, and layers whose calls cannot be captured in training."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from brandla.kfac import KFAC, Brand
from kfac.networks import EXACT, Words, stepped


class OwnForward(nn.Linear):
    def forward(self, inputs):
        return nn.functional.linear(inputs, 2 * self.weight, self.bias)


class Loose(nn.Sequential):
    def __init__(self, *modules):
        super().__init__(*modules)
        self.scale = nn.Parameter(torch.ones(()))


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, inputs, weight, bias):
        return super()._conv_forward(inputs, weight - weight.mean(), bias)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, query):
        return query


def with_one_weight(one, other):
    """Return two modules that share their weight, whatever they use it for."""
    other.weight = one.weight
    return nn.ModuleList([one, other])


ADDS = "it adds positions to keys and values (add_bias_kv, add_zero_attn)"
UNCALLED = {"1.out_proj": "the attention that holds it never calls it"}
COMPUTED = "its weight is computed from other parameters"
PARAMETRIZED = {"1": COMPUTED, "1.parametrizations.weight": "ParametrizationList is not known"}
# Modules, and the reasons why they or their parts are left.
LEFT = {
    "unknown": (nn.PReLU, "PReLU is not known"),
    "maximum": (lambda: nn.EmbeddingBag(4, 3, mode="max"), "its gradient is that of a maximum"),
    "no-parameters": (nn.ReLU, {}),
    "no-scale": (lambda: nn.LayerNorm(4, elementwise_affine=False), {}),
    "own-forward": (lambda: OwnForward(4, 4), "OwnForward has a forward pass of its own"),
    "own-convolution": (lambda: OwnConvolution(4, 4, 1), "OwnConvolution has a forward pass of its own"),
    "lazy": (lambda: nn.LazyLinear(4), "it has no shape yet: run it once before it is preconditioned"),
    "sparse-embedding": (lambda: nn.Embedding(4, 3, sparse=True), "its gradient is sparse"),
    "scaled-embedding": (lambda: nn.Embedding(4, 3, scale_grad_by_freq=True), "its gradient is scaled by frequency"),
    "synchronised": (lambda: nn.SyncBatchNorm(4), "its statistics come from several processes"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), PARAMETRIZED),
    "spectral": (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1, bias=False)), PARAMETRIZED),
    "spectral-norm-by-hooks": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), COMPUTED),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "its weight is not real"),
    "empty": (lambda: nn.Linear(4, 0), "its weight is empty"),
    "attention-with-bias": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), {"1": ADDS, **UNCALLED}),
    "attention-with-zeros": (lambda: nn.MultiheadAttention(4, 2, add_zero_attn=True), {"1": ADDS, **UNCALLED}),
    "own-attention": (lambda: OwnAttention(4, 2), {"1": "OwnAttention has a forward pass of its own", **UNCALLED}),
    "recurrent": (
        lambda: nn.LSTM(4, 4),
        "LSTM is not known: its time steps are one fused call; brandla.kfac.register(torch.nn.LSTM,"
        " like='unrolled') runs them one by one",
    ),
    "loose-parameter": (
        lambda: Loose(nn.ReLU(), nn.PReLU()),
        {"1.scale": "Loose uses it by itself", "1.1": "PReLU is not known"},
    ),
    "two-uses-of-a-weight": (
        lambda: with_one_weight(nn.Conv1d(3, 4, 5, bias=False), nn.Bilinear(3, 5, 4, bias=False)),
        {
            "1.0": "1.1 uses the same weight differently",
            "1.1": "1.0 uses the same weight differently",
        },
    ),
    "two-biases-of-a-weight": (
        lambda: with_one_weight(nn.Linear(6, 6), nn.Linear(6, 6)),
        {"1.1.bias": "1.0 has the same weight and another bias"},
    ),
}


@pytest.mark.parametrize(("make", "left"), LEFT.values(), ids=LEFT)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Initializing zero-element")
def test_the_report_lists_unsupported_modules_with_the_reason(make, left):
    report = KFAC(nn.Sequential(nn.Linear(4, 4), make()), EXACT).report()
    left = {"1": left} if isinstance(left, str) else left
    assert report.unsupported == left
    found = {row.layer for row in report.factors}
    assert "0" in found
    assert found.isdisjoint(left)
    for name, reason in left.items():
        assert f"{name}: {reason}" in str(report)


def step_and_gradient(model, preconditioner, loss):
    """Return the step and the gradient of each parameter."""
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return zip(stepped(model, preconditioner, loss), expected, strict=True)


@pytest.mark.filterwarnings("ignore:KFAC. the model has hooks")
@pytest.mark.parametrize("when", [0, 2])
def test_a_layer_that_cannot_be_captured_is_dropped_with_one_warning(when):
    """A sparse input in the first or a later step: from then on the layer has autograd's gradient, the rest goes on."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 3)), torch.randn(5, 4)
    preconditioner = KFAC(model, EXACT)
    for _ in range(when):
        stepped(model, preconditioner, model(inputs).square().mean())
    model[1].forward = Tensor.to_sparse
    with pytest.warns(UserWarning, match="left to the optimizer from now on: 2: its input is not a dense tensor"):
        parts = step_and_gradient(model, preconditioner, model(inputs).square().mean())
    assert [torch.equal(*part) for part in parts] == [False, False, True, True]
    report = preconditioner.report()
    assert report.unsupported == {"2": "its input is not a dense tensor"}
    assert {row.layer for row in report.factors} == {"0"}
    # A second warning would be an error. The layer stays dropped, also with dense inputs.
    model[1].forward = torch.relu
    parts = step_and_gradient(model, preconditioner, model(inputs).square().mean())
    assert [torch.equal(*part) for part in parts] == [False, False, True, True]
    resumed = KFAC(model, EXACT)
    resumed.load_state_dict(preconditioner.state_dict())
    assert resumed.report().unsupported == report.unsupported


LINEAR, CONV, TABLE, NORM = nn.Linear(4, 4), nn.Conv2d(2, 2, 1), nn.Embedding(4, 4), nn.InstanceNorm1d(2, affine=True)
ROWS, IMAGES, INDICES = torch.randn(3, 4), torch.randn(3, 2, 2, 2), torch.ones(3, 2, dtype=torch.long)
NESTED = torch.nested.nested_tensor([torch.randn(2, 4)], layout=torch.jagged)
# For each reason: a module, a user's hook that changes the output before the capture, and the input.
ODD_CALLS = {
    "its output is of type tuple, not a tensor": (LINEAR, lambda own: (own, 1), ROWS),
    "its output is of type dict, not a tensor": (CONV, lambda own: {"output": own}, IMAGES),
    "its output has shape (3,), but its input requires (3, 4)": (LINEAR, lambda own: own.sum(-1), ROWS),
    "its input is not a dense tensor": (LINEAR, lambda own: own, NESTED),
    "its input has 4 dimensions and its output 2; a batch has 4": (CONV, lambda own: own.flatten(1), IMAGES),
    "its input of shape (2, 2) is not a batch": (NORM, lambda own: own, IMAGES[0, 0]),
    "its output has shape (3, 4), but its input requires (3, 2, 4)": (TABLE, lambda own: own.sum(1), INDICES),
}


@pytest.mark.parametrize("reason", ODD_CALLS)
def test_no_call_makes_training_fail(reason):
    module, change, inputs = ODD_CALLS[reason]
    module = copy.deepcopy(module)
    module.register_forward_hook(lambda module, args, output: change(output))
    preconditioner = KFAC(module, EXACT)
    output = tree_leaves(module(inputs))[0]
    loss = (torch.cat(output.unbind()) if output.is_nested else output).square().sum()
    with pytest.warns(UserWarning, match="left to the optimizer from now on"):
        parts = step_and_gradient(module, preconditioner, loss)
    assert all(torch.equal(*part) for part in parts)
    assert preconditioner.report().unsupported == {"(model)": reason}


def test_a_weight_that_is_parametrized_later_is_dropped():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    preconditioner = KFAC(model, EXACT)
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.warns(UserWarning, match="1: its weight is computed from other parameters"):
        stepped(model, preconditioner, model(torch.randn(5, 4)).square().sum())


@pytest.mark.parametrize(
    ("inverse", "expected"),
    [
        ({"": Brand(2), "0.1": None}, {"0.0": Brand(2), "3": Brand(2)}),
        ({"": None, "0": Brand(2)}, {"0.0": Brand(2), "0.1": Brand(2)}),
        (lambda name, own: {nn.Conv2d: Brand(2), nn.Linear: EXACT}.get(type(own)), {"0.0": Brand(2), "3": EXACT}),
    ],
    ids=["all-but-one", "container", "rule"],
)
@pytest.mark.parametrize(
    "sharing",
    [{"0": "reduce", "0.1": "expand"}, lambda name, module: "reduce" if name.startswith("0.0") else "expand"],
    ids=["mapping", "rule"],
)
def test_options_hold_for_all_modules_in_a_container(inverse, sharing, expected):
    """None leaves a layer to the optimizer."""
    block = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    preconditioner = KFAC(model, inverse, sharing=sharing)
    assert {layer.name: layer.strategy for layer in preconditioner._layers} == expected
    assert {layer.name for layer in preconditioner._layers if layer.sharing == "reduce"} == {"0.0"}
    assert set(preconditioner.report().unsupported.values()) == {"inverse is None"}


EMPTY = {
    "every kind": (partial(Words, 7, 4, 3), lambda count: torch.ones(count, 5, dtype=torch.long)),
    "positions": (partial(nn.Linear, 4, 3), lambda count: torch.randn(2, count, 4)),
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("make", "inputs"), EMPTY.values(), ids=EMPTY)
def test_an_empty_batch_counts_for_nothing(make, inputs, sharing):
    """An expert without tokens gets an empty batch, as the first batch or a later one."""
    module = make()
    preconditioner = KFAC(module, EXACT, sharing=sharing)
    for count in (0, 3, 0):
        after = stepped(module, preconditioner, module(inputs(count)).square().sum())
        assert all(torch.isfinite(part).all() for part in after)
        assert count or not any(part.any() for part in after)
    assert preconditioner.report().unsupported == {}
    factors = [factor for layer in preconditioner._layers for _, factor in layer.curvature.factors()]
    assert [factor.state["total"].item() for factor in factors] == pytest.approx([0.05] * len(factors))
