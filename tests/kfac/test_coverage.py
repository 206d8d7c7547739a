"""Modules of any type that compute a known map, weights used in two ways, experts, bags and graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from brandla.kfac import KBFGS, KFAC, Adaptive, Brand, Strategy, register
from brandla.kfac.capture.kinds import like
from kfac.networks import (
    DENSE,
    EXACT,
    Conv1D,
    OwnLinear,
    RMSNorm,
    assert_dense_step,
    damped_inverse,
    dense_step,
    gradients,
    mlp,
    one_hot,
    stepped,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

DAMPING = 0.03
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers goes with it."""
    monkeypatch.setattr(like, "_REGISTERED", {})


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(6, dtype=DOUBLE))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.gamma


class Shifted(nn.LayerNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs - 1)


SCALES: dict[str, Callable[[], nn.Module]] = {
    "rms": RMSNorm,
    "gemma": lambda: RMSNorm(offset=1.0),
    "scale": LayerScale,
    "own-layer-norm": lambda: Shifted(6, dtype=DOUBLE),
}


@pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)
def test_what_scales_a_function_of_its_input_has_exact_blocks(make: Callable[[], nn.Module]):
    """M = N Σ g gᵀ of each channel, the gradients g of single samples by autograd."""
    torch.manual_seed(0)
    module = make()
    inputs = torch.randn(5, 2, 6, dtype=DOUBLE)
    samples = []
    weights = torch.randn(5, 2, 6, dtype=DOUBLE)
    for one, own in zip(inputs, weights, strict=True):
        module.zero_grad()
        (module(one[None]) * own).sum().backward()
        samples.append(torch.stack(gradients(module), -1))
    rows = torch.stack(samples)
    blocks = 5 * torch.einsum("nci,ncj->cij", rows, rows)
    eye = torch.eye(rows.shape[-1], dtype=DOUBLE)
    expected = torch.linalg.solve(blocks + 0.1 * eye, rows.sum(0)[..., None])[..., 0]
    preconditioner = KFAC(module, EXACT, damping=0.1, damping_scale="absolute", clip=None)
    after = stepped(module, preconditioner, (module(inputs) * weights).sum())
    torch.testing.assert_close(torch.stack(after, -1), expected)


class Gated(OwnLinear):
    """Cannot be tried with one tensor."""

    def forward(self, inputs: Tensor, gate: Tensor) -> Tensor:
        return super().forward(inputs) * 1


class Noisy(OwnLinear):
    """No linear map: its weight is another in every call."""

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight + torch.randn_like(self.weight), self.bias)


def test_what_a_user_registers_is_believed_and_the_rest_is_tried():
    model = nn.ModuleList([Gated(), Noisy(), OwnLinear()])
    state = torch.get_rng_state()
    names = [{row.layer for row in KFAC(model, EXACT).report().factors}]
    assert torch.equal(torch.get_rng_state(), state)
    register(Gated, like="linear")
    names.append({row.layer for row in KFAC(model, EXACT).report().factors})
    assert names == [{"2"}, {"0", "2"}]


@pytest.mark.parametrize(
    ("module", "way", "error"),
    [
        (nn.Linear(2, 2), "linear", "module must be a type of modules, such as MyLinear"),
        (OwnLinear, "scale", "like, for OwnLinear, must be 'linear' or 'transposed'; got 'scale'"),
        (nn.GRU, "linear", "like, for GRU, must be "),
    ],
    ids=["module", "like", "recurrent"],
)
def test_register_refuses(module: type, way: str, error: str):
    with pytest.raises((TypeError, ValueError), match=f"register: {error}"):
        register(module, like=way)


class Tied(nn.Module):
    """A language model whose output projection has the weight of its embeddings."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4, padding_idx=0, dtype=DOUBLE)
        self.hidden = nn.Linear(4, 4, dtype=DOUBLE)
        self.head = nn.Linear(4, 9, bias=bias, dtype=DOUBLE)
        self.head.weight = self.words.weight

    def forward(self, indices: Tensor) -> Tensor:
        self.entries = self.words(indices)
        self.last = torch.tanh(self.hidden(self.entries))
        self.logits = self.head(self.last)
        for part in (self.entries, self.logits):
            part.retain_grad()
        return self.logits


@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_weight_takes_in_both_of_its_uses(bias: bool):
    """Rows of the head, and of the embedding turned around: by the definition in docs/kfac.md, and above F of both."""
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
    of_both = torch.kron(left.T @ left, right.T @ right) + torch.kron(words.T @ words, turned.T @ turned)
    assert torch.linalg.eigvalsh(torch.kron(G, A) - of_both)[0] > -1e-12
    assert torch.trace(torch.kron(G, A)) <= 2 * torch.trace(of_both)
    preconditioner.step()
    torch.testing.assert_close(layer.gradient(), expected)
    assert preconditioner.report().unsupported == {}


@pytest.mark.parametrize("curvature", ["empirical", "monte-carlo", "type-2"])
def test_a_tied_weight_has_the_scale_of_both_uses(curvature: str):
    """With the traces t of A ⊗ G of the same network, untied, that of the tied one is (√t + √t')²."""
    roots = {}
    for is_tied in (False, True):
        model = Tied()
        if not is_tied:
            model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        preconditioner = KFAC(model, EXACT, curvature=curvature)
        output = model(torch.arange(1, 5))
        preconditioner.curvature(output, loss="mse")
        output.square().mean().backward()
        preconditioner.step()
        for layer in preconditioner._layers:
            (_, A), (_, G) = layer.curvature.factors()
            of_inputs = A.state["diagonal"].sum() if "diagonal" in A.state else A.state["dense"].trace()
            roots[is_tied, layer.name] = float(of_inputs * G.state["dense"].trace()) ** 0.5
    assert roots[True, "head"] == pytest.approx(roots[False, "head"] + roots[False, "words"])


@pytest.mark.parametrize("name", ["words", "head"])
def test_none_for_either_user_leaves_a_tied_weight(name: str):
    report = KFAC(Tied(), {"": EXACT, name: None}).report()
    assert report.unsupported == {"words": "inverse is None", "head": "inverse is None"}


class Experts(nn.Module):
    """Two weights for each of several experts, in two parameters; ``way`` is how they are multiplied with."""

    def __init__(self, way: str, turned: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        up, down = (torch.randn(3, *size, generator=generator) for size in ((8, 4), (4, 8)))
        self.up = nn.Parameter(up.mT.contiguous() if turned else up)
        self.down = nn.Parameter(down.mT.contiguous() if turned else down)
        self.way, self.turned = way, turned

    def product(self, inputs: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        if self.way == "grouped":
            return nn.functional.grouped_mm(inputs, weight if self.turned else weight.transpose(-2, -1), offs=ends)
        products = []
        for index, part in enumerate(inputs.tensor_split(ends[:-1].tolist())):
            own = weight[torch.tensor(index)] if index else weight[0]
            products.append(part @ own if self.turned else linear(part, own))
        return torch.cat(products)

    def forward(self, inputs: Tensor, ends: Tensor) -> Tensor:
        return self.product(self.product(inputs, self.up, ends).relu(), self.down, ends)

    def gradient(self, name: str) -> Tensor:
        gradient = self.get_parameter(name).grad
        return gradient.mT if self.turned else gradient


class Apart(nn.Module):
    """The same experts as modules."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        for name in ("up", "down"):
            weights = experts.get_parameter(name).detach().clone()
            linears = nn.ModuleList(nn.Linear(4, 8, bias=False) for _ in weights)
            for own, weight in zip(linears, weights.mT if experts.turned else weights, strict=True):
                own.weight = nn.Parameter(weight.contiguous())
            setattr(self, name, linears)

    def forward(self, inputs: Tensor, ends: Tensor) -> Tensor:
        parts = zip(inputs.tensor_split(ends[:-1].tolist()), self.up, self.down, strict=True)
        return torch.cat([down(up(part).relu()) for part, up, down in parts])

    def gradient(self, name: str) -> Tensor:
        return torch.stack([own.weight.grad for own in getattr(self, name)])


def preconditioned(way: str, turned: bool, strategy: Strategy, **options: Any) -> list[tuple[nn.Module, KFAC]]:
    """Experts in one parameter, and as modules."""
    experts = Experts(way, turned)
    return [(model, KFAC(model, strategy, **options)) for model in (experts, Apart(experts))]


needs_grouped = pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="torch has no grouped_mm")
ENDS = torch.tensor([4, 8, 12], dtype=torch.int32)


@pytest.mark.parametrize("way", ["one-by-one", pytest.param("grouped", marks=needs_grouped)])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_one_parameter_step_as_experts_that_are_modules(way: str, turned: bool):
    """The last one gets no row in the second step, and keeps its factors."""
    torch.manual_seed(0)
    (experts, own), (modules, _) = pairs = preconditioned(way, turned, EXACT, clip=None)
    kept = []
    for ends in (ENDS, torch.tensor([5, 12, 12], dtype=torch.int32)):
        inputs = torch.randn(12, 4)
        for model, preconditioner in pairs:
            stepped(model, preconditioner, weighted(model(inputs, ends)))
        for name in ("up", "down"):
            torch.testing.assert_close(experts.gradient(name), modules.gradient(name), rtol=1e-3, atol=1e-4)
        kept.append(own._layers[2].curvature.state_dict()["input"]["state"]["dense"].clone())
    assert torch.equal(*kept)
    assert [layer.name for layer in own._layers] == [f"{name}.{index}" for name in ("up", "down") for index in range(3)]
    assert own.report().unsupported == {}


@pytest.mark.parametrize("turned", [False, True])
def test_what_a_system_makes_of_weights_is_of_each_expert_alone(turned: bool):
    inputs = torch.randn(12, 4)
    (experts, _), (modules, _) = pairs = preconditioned("one-by-one", turned, KBFGS(), clip=None)
    for take in (KFAC.step, KFAC.second_pass, KFAC.step):
        for model, preconditioner in pairs:
            model.zero_grad()
            weighted(model(inputs, ENDS).square()).backward()
            take(preconditioner)
            if take is KFAC.step:
                torch.optim.SGD(model.parameters(), 1e-3).step()
    torch.testing.assert_close(experts.gradient("down"), modules.gradient("down"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
def test_the_reduction_that_is_predicted_is_of_all_experts(turned: bool):
    inputs, ratios = torch.randn(12, 4), []
    for model, preconditioner in preconditioned("one-by-one", turned, EXACT, damping=Adaptive(initial=0.1, every=1)):

        def loss_of(model: nn.Module = model) -> Tensor:
            return model(inputs, ENDS).square().mean()

        loss = loss_of()
        stepped(model, preconditioner, loss)
        torch.optim.SGD(model.parameters(), 0.1).step()
        ratios.append(preconditioner.adapt(loss, loss_of))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


def test_an_expert_that_was_given_nothing_yet_is_no_cause_for_a_warning(recwarn: pytest.WarningsRecorder):
    experts = Experts("one-by-one")
    stepped(experts, KFAC(experts, EXACT), weighted(experts(torch.randn(12, 4), torch.tensor([6, 12, 12]))))
    assert not [warning for warning in recwarn if "none of the calls" in str(warning.message)]


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("offsets", [None, [0, 2, 2, 5]], ids=["matrix", "offsets"])
def test_each_index_of_a_bag_is_a_row(mode: str, offsets: list[int] | None):
    torch.manual_seed(0)
    module = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=2, dtype=DOUBLE)
    preconditioner = KFAC(module, EXACT, **DENSE)
    indices = torch.arange(8) % 5
    weighted(module(indices.view(2, 4)) if offsets is None else module(indices, torch.tensor(offsets))).backward()
    assert_dense_step(preconditioner)


class Graphs(nn.Module):
    """Two graph convolutions, and a class for each graph: the mean over its nodes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = OwnLinear(6, 5), OwnLinear(5, 3, bias=False)

    def forward(self, features: Tensor, neighbours: Tensor, index: Tensor) -> Tensor:
        nodes = self.second(neighbours @ torch.tanh(neighbours @ self.first(features)))
        sums = nodes.new_zeros(int(index.max()) + 1, 3).index_add_(0, index, nodes)
        return sums / index.bincount()[:, None]


def test_graphs_are_samples_in_reduce():
    model = Graphs()
    index = torch.tensor([0] * 4 + [1] * 3 + [2] * 5)
    neighbours = (index[:, None] == index).double() * torch.rand(12, 12, dtype=DOUBLE)
    features, labels = torch.randn(12, 6, dtype=DOUBLE), torch.arange(3)
    preconditioner = KFAC(model, EXACT, sharing="reduce", damping=DAMPING, clip=None)
    with preconditioner.graphs(index):
        output = model(features, neighbours, index)
    nn.functional.cross_entropy(output, labels).backward()
    pool = nn.functional.one_hot(index).double().T
    expected = []
    for layer in preconditioner._layers:
        (call,) = layer.capture.calls
        ones = torch.ones(12, layer.has_bias, dtype=DOUBLE)
        inputs, gammas = torch.cat([call.inputs, ones], 1), call.gradients["loss"][0]
        torch.testing.assert_close(gammas.T @ inputs, layer.gradient())
        expected.append(dense_step(pool @ inputs / pool.sum(1, keepdim=True), pool @ gammas, layer.gradient(), DAMPING))
    preconditioner.step()
    torch.testing.assert_close([layer.gradient() for layer in preconditioner._layers], expected)
    with pytest.raises(ValueError, match=r"KFAC.graphs: index must be a vector of integers.*float32 of shape \(2, 2\)"):
        preconditioner.graphs(torch.rand(2, 2)).__enter__()


def test_calls_by_keyword_and_of_one_vector_are_seen():
    for module in (Conv1D(), nn.Linear(6, 4, dtype=DOUBLE)):
        preconditioner = KFAC(module, EXACT, **DENSE)
        name = "inputs" if isinstance(module, Conv1D) else "input"
        weighted(module(**{name: torch.randn(6, dtype=DOUBLE)})).backward()
        assert_dense_step(preconditioner)


def test_two_optimizers_split_a_model():
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(), Conv1D(5, 3).float(), nn.LayerNorm(3))
    preconditioner = KFAC(model, {"": EXACT, "3": None})
    own, others = preconditioner.parameters(), preconditioner.others()
    assert [id(part) for part in own] == [id(part) for module in (model[0], model[2]) for part in module.parameters()]
    assert {id(part) for part in others} == {id(part) for index in (1, 3) for part in model[index].parameters()}


@pytest.mark.filterwarnings("default:KFAC")
def test_a_warning_about_many_layers_is_short():
    model = mlp(*[6] * 40)
    preconditioner = KFAC(model, Brand(100))
    model(torch.randn(5, 6, dtype=DOUBLE)).sum().backward()
    with pytest.warns(UserWarning, match=r"and 76 more, see report\(\)$") as told:
        preconditioner.step()
    assert len(str(told[0].message)) < 300
