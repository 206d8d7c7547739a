"""Modules of any type that compute a known map, tied weights, and experts."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from brandla.kfac import KFAC, Adaptive, Brand, register
from brandla.kfac.capture.kinds import like
from kfac.networks import (
    DENSE,
    EXACT,
    Conv1D,
    OwnLinear,
    assert_dense_step,
    average,
    damped_inverse,
    gradients,
    mlp,
    one_hot,
    stepped,
    weighted,
)

DAMPING = 0.03
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Undo the registrations of each test."""
    monkeypatch.setattr(like, "_REGISTERED", {})


class Gated(OwnLinear):
    """Cannot be called with one tensor."""

    def forward(self, inputs, gate):
        return super().forward(inputs) * 1


class Noisy(OwnLinear):
    """Is no linear map, since its weight changes in every call."""

    def forward(self, inputs):
        return linear(inputs, self.weight + torch.randn_like(self.weight), self.bias)


def test_registered_types_are_trusted_and_others_are_tried():
    model = nn.ModuleList([Gated(), Noisy(), OwnLinear()])
    state = torch.get_rng_state()
    names = [{row.layer for row in KFAC(model, EXACT).report().factors}]
    assert torch.equal(torch.get_rng_state(), state)
    register(Gated, like="linear")
    names.append({row.layer for row in KFAC(model, EXACT).report().factors})
    assert names == [{"2"}, {"0", "2"}]


class Tied(nn.Module):
    """A language model whose output projection has the weight of its embeddings."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4, padding_idx=0, dtype=DOUBLE)
        self.hidden = nn.Linear(4, 4, dtype=DOUBLE)
        self.head = nn.Linear(4, 9, bias=bias, dtype=DOUBLE)
        self.head.weight = self.words.weight

    def forward(self, indices):
        self.entries = self.words(indices)
        self.last = torch.tanh(self.hidden(self.entries))
        self.logits = self.head(self.last)
        for part in (self.entries, self.logits):
            part.retain_grad()
        return self.logits


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_weight_takes_in_both_of_its_uses(bias):
    """Rows of the head and transposed rows of the embedding, by the definition in docs/kfac.md."""
    model = Tied(bias)
    indices = torch.arange(12).reshape(3, 4) % 9
    preconditioner = KFAC(model, EXACT, damping=DAMPING, clip=None)
    nn.functional.cross_entropy(model(indices).flatten(0, 1), indices.flatten().roll(1)).backward()
    layer = preconditioner._layers[0]
    assert layer.name == "head"
    is_word = (indices.flatten() != 0)[:, None]
    left, right = model.logits.grad.flatten(0, 1), model.last.detach().flatten(0, 1)
    words, turned = one_hot(indices.flatten(), 9) * is_word, model.entries.grad.flatten(0, 1) * is_word
    if bias:
        right = torch.cat([right, right.new_ones(12, 1)], 1)
        turned = torch.cat([turned, turned.new_zeros(12, 1)], 1)
    gradient = layer.gradient()
    torch.testing.assert_close(left.T @ right + words.T @ turned, gradient)
    norms = [float(part.norm()) for part in (left, right, words, turned)]
    s = (norms[0] * norms[3] / (norms[1] * norms[2])) ** 0.5
    G, A = left.T @ left + s**2 * words.T @ words, right.T @ right + turned.T @ turned / s**2
    expected = damped_inverse(12 * G, DAMPING) @ gradient @ damped_inverse(A / 12, DAMPING)
    preconditioner.step()
    torch.testing.assert_close(layer.gradient(), expected)
    assert preconditioner.report().unsupported == {}


@pytest.mark.parametrize("curvature", ["empirical", "monte-carlo", "type-2"])
def test_a_tied_weight_has_the_scale_of_both_uses(curvature):
    """If A ⊗ G of the untied weights have traces t and t', the trace of the tied weight is (√t + √t')²."""
    roots = {}
    for is_tied in (False, True):
        model = Tied()
        if not is_tied:
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        preconditioner = KFAC(model, EXACT, curvature=curvature)
        output = model(torch.arange(1, 5))
        preconditioner.curvature(output, loss="mse")
        stepped(model, preconditioner, output.square().mean())
        for layer in preconditioner._layers:
            (_, A), (_, G) = layer.curvature.factors()
            of_inputs = A.state["diagonal"].sum() if "diagonal" in A.state else A.state["dense"].trace()
            roots[is_tied, layer.name] = float(of_inputs * G.state["dense"].trace()) ** 0.5
    assert roots[True, "head"] == pytest.approx(roots[False, "head"] + roots[False, "words"])


@pytest.mark.parametrize("name", ["words", "head"])
def test_none_for_either_user_leaves_a_tied_weight(name):
    report = KFAC(Tied(), {"": EXACT, name: None}).report()
    assert report.unsupported == {"words": "inverse is None", "head": "inverse is None"}


class Experts(nn.Module):
    """Two weights for each of several experts, in two parameters, multiplied one by one or grouped."""

    def __init__(self, way="one-by-one", turned=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        up, down = (torch.randn(3, *size, generator=generator) for size in ((8, 4), (4, 8)))
        self.up = nn.Parameter(up.mT.contiguous() if turned else up)
        self.down = nn.Parameter(down.mT.contiguous() if turned else down)
        self.way, self.turned = way, turned

    def product(self, inputs, weight, ends):
        if self.way == "grouped":
            return nn.functional.grouped_mm(inputs, weight if self.turned else weight.transpose(-2, -1), offs=ends)
        products = []
        for index, part in enumerate(inputs.tensor_split(ends[:-1].tolist())):
            own = weight[torch.tensor(index)] if index else weight[0]
            products.append(part @ own if self.turned else linear(part, own))
        return torch.cat(products)

    def forward(self, inputs, ends):
        return self.product(self.product(inputs, self.up, ends).relu(), self.down, ends)


needs_grouped = pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="torch has no grouped_mm")
both_orders = pytest.mark.parametrize("turned", [False, True])
ENDS, LAST_IS_IDLE = torch.tensor([[4, 8, 12], [5, 12, 12]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("way", "dtype", "tolerance"),
    [("one-by-one", DOUBLE, 1e-8), pytest.param("grouped", torch.float32, 1e-3, marks=needs_grouped)],
)
@both_orders
def test_each_expert_in_one_parameter_is_a_layer(way, dtype, tolerance, turned):
    """An expert without rows in a step keeps its factors. An expert that never had rows causes no warning."""
    torch.manual_seed(0)
    experts, (first, second) = Experts(way, turned).to(dtype), torch.randn(2, 12, 4, dtype=dtype)
    preconditioner = KFAC(experts, EXACT, **DENSE)
    # This small loss makes λ the larger part of G, so float32 loses few digits.
    (weighted(experts(first, ENDS)) / 100).backward()
    assert_dense_step(preconditioner, tolerance)
    before = average(preconditioner, layer=2), average(preconditioner, layer=1)
    stepped(experts, preconditioner, weighted(experts(second, LAST_IS_IDLE)))
    after = average(preconditioner, layer=2), average(preconditioner, layer=1)
    assert [*map(torch.equal, before, after)] == [True, False]
    names = [layer.name for layer in preconditioner._layers]
    assert names == ["up.0", "up.1", "up.2", "down.0", "down.1", "down.2"]
    weights = [weight.mT if turned else weight for name in ("up", "down") for weight in experts.get_parameter(name)]
    assert all(map(torch.equal, (layer.parameters() for layer in preconditioner._layers), weights))
    assert preconditioner.report().unsupported == {}
    fresh = Experts(way, turned).to(dtype)
    stepped(fresh, KFAC(fresh, EXACT), weighted(fresh(second, LAST_IS_IDLE)))


@both_orders
def test_the_predicted_reduction_includes_all_experts(turned):
    """And scales: β (1 − β/2) ⟨s, ∂W⟩ at the rate β, where s solves with the damped curvature."""
    model, inputs = nn.ModuleList([Experts(turned=turned), nn.LayerNorm(4)]), torch.randn(12, 4)
    preconditioner = KFAC(model, EXACT, clip=None, damping=Adaptive(initial=0.1, every=1))

    def loss_of():
        return model[1](inputs + model[0](inputs, ENDS)).square().mean()

    loss = loss_of()
    loss.backward()
    before = gradients(model)
    preconditioner.step()
    torch.optim.SGD(model.parameters(), 0.1).step()
    slope = sum((one * other).sum() for one, other in zip(before, gradients(model), strict=True))
    expected = (loss - loss_of()) / (slope * (0.1 - 0.1**2 / 2))
    assert preconditioner.adapt(loss, loss_of) == pytest.approx(expected.item(), rel=1e-3)


def test_two_optimizers_split_a_model():
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(), Conv1D(5, 3).float(), nn.LayerNorm(3))
    preconditioner = KFAC(model, {"": EXACT, "3": None})
    own, others = preconditioner.parameters(), preconditioner.others()
    assert [id(part) for part in own] == [id(part) for module in (model[0], model[2]) for part in module.parameters()]
    assert {id(part) for part in others} == {id(part) for index in (1, 3) for part in model[index].parameters()}


def test_a_warning_about_many_layers_is_short():
    model = mlp(*[6] * 40)
    preconditioner = KFAC(model, Brand(100))
    model(torch.randn(5, 6, dtype=DOUBLE)).sum().backward()
    with pytest.warns(UserWarning, match=r"and 76 more, see report\(\)$") as told:
        preconditioner.step()
    assert len(str(told[0].message)) < 300
