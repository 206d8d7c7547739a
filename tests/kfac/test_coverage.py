"""Modules of any type that compute a known map, weights used in two ways, experts, recurrent layers, graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from brandla.kfac import KBFGS, KFAC, Adaptive, Brand, Exact, register
from brandla.kfac.capture.kinds import like
from brandla.kfac.capture.layer import Layer
from kfac.networks import damped_inverse, dense_step, gradients, mlp, stepped

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

DAMPING = 0.03
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers goes with it."""
    monkeypatch.setattr(like, "_REGISTERED", {})


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=DOUBLE))


class Conv1D(nn.Module):
    """As transformers has it: a Linear whose weight is transposed."""

    def __init__(self, d_in: int = 6, d_out: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.d_out = d_out
        self.weight = parameter(d_in, d_out)
        self.bias = parameter(d_out) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        output = flat @ self.weight if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return output.view(*inputs.shape[:-1], self.d_out)


class Linear(nn.Module):
    """As torch_geometric has it."""

    def __init__(self, d_in: int = 6, d_out: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.weight = parameter(d_out, d_in)
        self.bias = parameter(d_out) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight, self.bias)


class Doubled(nn.Linear):
    """Its product is not one with its input, but is seen."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(2 * inputs).relu()


class Router(nn.Module):
    """Returns more than the product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(4, 6)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = linear(inputs, self.weight)
        return logits.softmax(-1), logits.argmax(-1)


class Adapter(nn.Module):
    """Two matrices of one module, by functions and operators, with transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = parameter(3, 6)
        self.up = parameter(3, 4)
        self.up_bias = parameter(4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs @ self.down.transpose(0, 1)
        return torch.addmm(self.up_bias, hidden.tanh().flatten(0, -2), self.up).unflatten(0, inputs.shape[:-1])


LINEAR: dict[str, Callable[[], nn.Module]] = {
    "transposed": Conv1D,
    "transposed-square": lambda: Conv1D(6, 6, bias=False),
    "own-type": Linear,
    "own-type-no-bias": lambda: Linear(bias=False),
    "own-type-square": lambda: Linear(6, 6),
    "own-forward": lambda: Doubled(6, 4, dtype=DOUBLE),
    "router": Router,
    "two-matrices": Adapter,
    "bilinear": lambda: nn.Bilinear(6, 6, 4, dtype=DOUBLE),
}


def output_of(module: nn.Module, inputs: Tensor) -> Tensor:
    output = module(inputs, inputs.flip(0)) if isinstance(module, nn.Bilinear) else module(inputs)
    return output[0] if isinstance(output, tuple) else output


def backward(output: Tensor) -> None:
    generator = torch.Generator().manual_seed(5)
    (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum().backward()


def expected_step(layer: Layer) -> Tensor:
    """The step of the dense definition, from rows that make up the gradient."""
    rows = layer.rows("loss", None)
    assert rows is not None
    torch.testing.assert_close(rows.gradients.mT @ rows.inputs, layer.gradient())
    return dense_step(rows.inputs, rows.gradients, layer.gradient(), DAMPING)


@pytest.mark.parametrize("strategy", [Exact(inverse_every=1), Brand(5)], ids=["exact", "brand"])
@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_what_computes_a_linear_map_is_a_linear_layer(make: Callable[[], nn.Module], strategy: Exact | Brand):
    torch.manual_seed(0)
    module = make()
    inputs = torch.randn(5, 2, 6, dtype=DOUBLE)
    plain = output_of(module, inputs)
    preconditioner = KFAC(module, strategy, damping=DAMPING, clip=None)
    output = output_of(module, inputs)
    assert torch.equal(output, plain)
    backward(output)
    expected = [expected_step(layer) for layer in preconditioner._layers]
    preconditioner.step()
    assert preconditioner.report().unsupported == {}
    assert len(preconditioner.parameters()) == len(list(module.parameters()))
    if isinstance(strategy, Exact):
        torch.testing.assert_close([layer.gradient() for layer in preconditioner._layers], expected)
    preconditioner.remove()
    assert "forward" not in vars(module)


class RMSNorm(nn.Module):
    """As Llama and T5 have it; with ``offset`` 1 as Gemma does."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = parameter(6)
        self.offset = offset

    def forward(self, inputs: Tensor) -> Tensor:
        wide = inputs.float() if inputs.dtype == torch.bfloat16 else inputs
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (normal * (self.offset + self.weight)).type_as(inputs)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = parameter(6)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.gamma


class Shifted(nn.LayerNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs - 1)


SCALES: dict[str, Callable[[], nn.Module]] = {
    "rms": RMSNorm,
    "gemma": lambda: RMSNorm(1.0),
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
    preconditioner = KFAC(module, Exact(), damping=0.1, damping_scale="absolute", clip=None)
    after = stepped(module, preconditioner, (module(inputs) * weights).sum())
    torch.testing.assert_close(torch.stack(after, -1), expected)


class Gated(Linear):
    """Cannot be tried with one tensor."""

    def forward(self, inputs: Tensor, gate: Tensor) -> Tensor:
        return super().forward(inputs) * 1


class Noisy(Linear):
    """No linear map: its weight is another in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.append(inputs)
        return linear(inputs, self.weight + torch.randn_like(self.weight), self.bias)


def test_what_a_user_registers_is_believed_and_the_rest_is_tried():
    model = nn.ModuleList([Gated(), Noisy(), Linear()])
    state = torch.get_rng_state()
    names = [{row.layer for row in KFAC(model, Exact()).report().factors}]
    assert torch.equal(torch.get_rng_state(), state)
    register(Gated, like="linear")
    names.append({row.layer for row in KFAC(model, Exact()).report().factors})
    assert names == [{"2"}, {"0", "2"}]
    assert model[1].calls == []


@pytest.mark.parametrize(
    ("module", "way", "error"),
    [
        (nn.Linear(2, 2), "linear", "module must be a type of modules, such as MyLinear"),
        (Linear, "scale", "like, for Linear, must be 'linear' or 'transposed'; got 'scale'"),
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
    preconditioner = KFAC(model, Exact(inverse_every=1), damping=DAMPING, clip=None)
    nn.functional.cross_entropy(model(indices).flatten(0, 1), indices.flatten().roll(1)).backward()
    layer = preconditioner._layers[0]
    assert layer.name == "head"
    one_hot = nn.functional.one_hot(indices.flatten(), 9).double() * (indices.flatten() != 0)[:, None]
    left, right = model.logits.grad.flatten(0, 1), model.last.detach().flatten(0, 1)
    turned = model.entries.grad.flatten(0, 1) * (indices.flatten() != 0)[:, None]
    if bias:
        right = torch.cat([right, right.new_ones(12, 1)], 1)
        turned = torch.cat([turned, turned.new_zeros(12, 1)], 1)
    gradient = layer.gradient()
    torch.testing.assert_close(left.T @ right + one_hot.T @ turned, gradient)
    norms = [float(part.norm()) for part in (left, right, one_hot, turned)]
    s = (norms[0] * norms[3] / (norms[1] * norms[2])) ** 0.5
    G, A = left.T @ left + s**2 * one_hot.T @ one_hot, right.T @ right + turned.T @ turned / s**2
    expected = damped_inverse(12 * G, DAMPING) @ gradient @ damped_inverse(A / 12, DAMPING)
    of_both = torch.kron(left.T @ left, right.T @ right) + torch.kron(one_hot.T @ one_hot, turned.T @ turned)
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
        preconditioner = KFAC(model, Exact(), curvature=curvature)
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
    model = Tied()
    report = KFAC(model, {"": Exact(), name: None}).report()
    assert report.unsupported == {"words": "inverse is None", "head": "inverse is None"}


def test_a_tied_weight_trains_with_a_low_rank():
    model = Tied().float()
    preconditioner = KFAC(model, {"": Exact(), "head": Brand(2)}, sharing="reduce")
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    indices = torch.arange(1, 9).reshape(2, 4)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(indices).flatten(0, 1), indices.flatten())
        stepped(model, preconditioner, loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


class Experts(nn.Module):
    """Two weights for each of several experts, in two parameters; ``way`` is how they are multiplied with."""

    def __init__(self, way: str, turned: bool = False, count: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        up, down = (torch.randn(count, *size, generator=generator) for size in ((8, 4), (4, 8)))
        self.up = nn.Parameter(up.mT.contiguous() if turned else up)
        self.down = nn.Parameter(down.mT.contiguous() if turned else down)
        self.way, self.turned = way, turned

    def product(self, inputs: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        if self.way == "grouped":
            return nn.functional.grouped_mm(inputs, weight if self.turned else weight.transpose(-2, -1), offs=offsets)
        ends = [0, *offsets.tolist()]
        parts = []
        for index, (start, end) in enumerate(pairwise(ends)):
            own = weight[torch.tensor(index)] if index else weight[0]
            part = inputs[start:end]
            parts.append(part @ own if self.turned else linear(part, own))
        return torch.cat(parts)

    def forward(self, inputs: Tensor, offsets: Tensor) -> Tensor:
        return self.product(self.product(inputs, self.up, offsets).relu(), self.down, offsets)


def apart(experts: Experts) -> nn.ModuleList:
    """The same experts as modules."""
    pairs = []
    for up, down in zip(experts.up.detach(), experts.down.detach(), strict=True):
        pair = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
        pair[0].weight.data.copy_(up.mT if experts.turned else up)
        pair[2].weight.data.copy_(down.mT if experts.turned else down)
        pairs.append(pair)
    return nn.ModuleList(pairs)


needs_grouped = pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="torch has no grouped_mm")


@pytest.mark.parametrize("way", ["one-by-one", pytest.param("grouped", marks=needs_grouped)])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_one_parameter_step_as_experts_that_are_modules(way: str, turned: bool):
    """The last one gets no row in the second step, and keeps its factors."""
    experts = Experts(way, turned)
    modules = apart(experts)
    own, other = (KFAC(model, Exact(inverse_every=1), clip=None) for model in (experts, modules))
    torch.manual_seed(0)
    for ends in ((4, 8, 12), (5, 12, 12)):
        inputs = torch.randn(12, 4)
        kept = own._layers[2].curvature.state_dict()["input"]["state"] if own._layers[2].curvature.started else None
        backward(experts(inputs, torch.tensor(ends, dtype=torch.int32)))
        counts = [end - start for start, end in pairwise((0, *ends))]
        backward(torch.cat([module(part) for module, part in zip(modules, inputs.split(counts), strict=True)]))
        own.step()
        other.step()
        for name, index in (("up", 0), ("down", 2)):
            expected = torch.stack([module[index].weight.grad for module in modules])
            actual = experts.get_parameter(name).grad
            torch.testing.assert_close(actual.mT if turned else actual, expected, rtol=1e-3, atol=1e-4)
        if kept is not None:
            now = own._layers[2].curvature.state_dict()["input"]["state"]
            assert torch.equal(now["dense"], kept["dense"])
        for model in (experts, modules):
            model.zero_grad()
    assert [layer.name for layer in own._layers] == [f"{name}.{index}" for name in ("up", "down") for index in range(3)]
    assert own.report().unsupported == {}


@pytest.mark.parametrize("turned", [False, True])
def test_what_a_system_makes_of_weights_is_of_each_expert_alone(turned: bool):
    experts = Experts("one-by-one", turned)
    modules, inputs = apart(experts), torch.randn(12, 4)
    own, other = (KFAC(model, KBFGS(), clip=None) for model in (experts, modules))
    for take in (KFAC.step, KFAC.second_pass, KFAC.step):
        for model in (experts, modules):
            model.zero_grad()
        backward(experts(inputs, torch.tensor([4, 8, 12], dtype=torch.int32)).square())
        backward(torch.cat([module(part) for module, part in zip(modules, inputs.split(4), strict=True)]).square())
        for preconditioner in (own, other):
            take(preconditioner)
            if take is KFAC.step:
                torch.optim.SGD(preconditioner.parameters(), 1e-3).step()
    expected = torch.stack([module[2].weight.grad for module in modules])
    actual = experts.down.grad
    torch.testing.assert_close(actual.mT if turned else actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True])
def test_the_reduction_that_is_predicted_is_of_all_experts(turned: bool):
    experts = Experts("one-by-one", turned)
    modules, inputs = apart(experts), torch.randn(12, 4)
    ends = torch.tensor([4, 8, 12], dtype=torch.int32)

    def of_modules() -> Tensor:
        return torch.cat([module(part) for module, part in zip(modules, inputs.split(4), strict=True)]).square().mean()

    ratios = []
    for model, loss_of in ((experts, lambda: experts(inputs, ends).square().mean()), (modules, of_modules)):
        preconditioner = KFAC(model, Exact(inverse_every=1), damping=Adaptive(initial=0.1, every=1))
        loss = loss_of()
        loss.backward()
        preconditioner.step()
        torch.optim.SGD(model.parameters(), 0.1).step()
        ratios.append(preconditioner.adapt(loss, loss_of))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


def test_an_expert_that_was_given_nothing_yet_is_no_cause_for_a_warning(recwarn: pytest.WarningsRecorder):
    experts = Experts("one-by-one")
    preconditioner = KFAC(experts, Exact())
    backward(experts(torch.randn(12, 4), torch.tensor([6, 12, 12])))
    preconditioner.step()
    assert not [warning for warning in recwarn if "none of the calls" in str(warning.message)]


RECURRENT = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True, "bidirectional": True, "num_layers": 2}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)
def test_a_recurrent_layer_is_unrolled_where_a_user_asks(make: Callable[..., nn.RNNBase], options: dict):
    torch.manual_seed(0)
    module = make(4, 5, dtype=DOUBLE, **options)
    inputs = torch.randn(3, 6, 4, dtype=DOUBLE)
    expected, ended = module(inputs)
    backward(expected)
    plain = gradients(module)
    module.zero_grad()
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        register(kind, like="unrolled")
    preconditioner = KFAC(module, Exact(inverse_every=1), damping=DAMPING, clip=None)
    output, last = module(inputs)
    torch.testing.assert_close((output, last), (expected, ended))
    backward(output)
    torch.testing.assert_close(gradients(module), plain)
    steps = [expected_step(layer) for layer in preconditioner._layers]
    assert {layer.rows("loss", None).positions for layer in preconditioner._layers} == {
        6 if "batch_first" in options else 3
    }
    preconditioner.step()
    torch.testing.assert_close([layer.gradient() for layer in preconditioner._layers], steps)
    assert preconditioner.report().unsupported == {}


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("offsets", [None, [0, 2, 2, 5]], ids=["matrix", "offsets"])
def test_each_index_of_a_bag_is_a_row(mode: str, offsets: list[int] | None):
    torch.manual_seed(0)
    module = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=2, dtype=DOUBLE)
    preconditioner = KFAC(module, Exact(inverse_every=1), damping=DAMPING, clip=None)
    indices = torch.arange(8) % 5
    backward(module(indices.view(2, 4)) if offsets is None else module(indices, torch.tensor(offsets)))
    (layer,) = preconditioner._layers
    rows = layer.rows("loss", None)
    one_hot = nn.functional.one_hot(rows.inputs.clamp(min=0), 9).double() * (rows.inputs >= 0)[:, None]
    torch.testing.assert_close(rows.gradients.mT @ one_hot, layer.gradient())
    expected = dense_step(one_hot, rows.gradients, layer.gradient(), DAMPING)
    preconditioner.step()
    torch.testing.assert_close(layer.gradient(), expected)


class Graphs(nn.Module):
    """Two graph convolutions, and a class for each graph: the mean over its nodes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Linear(6, 5), Linear(5, 3, bias=False)

    def forward(self, features: Tensor, neighbours: Tensor, index: Tensor) -> Tensor:
        nodes = self.second(neighbours @ torch.tanh(neighbours @ self.first(features)))
        sums = nodes.new_zeros(int(index.max()) + 1, 3).index_add_(0, index, nodes)
        return sums / index.bincount()[:, None]


def test_graphs_are_samples_in_reduce():
    model = Graphs()
    index = torch.tensor([0] * 4 + [1] * 3 + [2] * 5)
    neighbours = (index[:, None] == index).double() * torch.rand(12, 12, dtype=DOUBLE)
    features, labels = torch.randn(12, 6, dtype=DOUBLE), torch.arange(3)
    preconditioner = KFAC(model, Exact(inverse_every=1), sharing="reduce", damping=DAMPING, clip=None)
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


def test_a_call_by_keyword_is_seen():
    module = Conv1D()
    preconditioner = KFAC(module, Exact())
    backward(module(inputs=torch.randn(3, 6, dtype=DOUBLE)))
    expected_step(preconditioner._layers[0])


def test_two_optimizers_split_a_model():
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(), Conv1D(5, 3).float(), nn.LayerNorm(3))
    preconditioner = KFAC(model, {"": Exact(), "3": None})
    own, others = preconditioner.parameters(), preconditioner.others()
    assert [id(part) for part in own] == [id(part) for module in (model[0], model[2]) for part in module.parameters()]
    assert {id(part) for part in others} == {id(part) for index in (1, 3) for part in model[index].parameters()}


def test_a_preconditioner_that_is_dropped_takes_its_hooks_along():
    gc.disable()
    try:
        model = nn.Sequential(*mlp(4, 3, 3), Router().float(), nn.MultiheadAttention(4, 2))
        preconditioner = KFAC(model, Exact())
        model[:3](torch.randn(5, 4, dtype=DOUBLE)).sum().backward()
        gone = [ref(preconditioner), ref(preconditioner._layers[0].capture.calls[0].inputs)]
        del preconditioner
        assert [part() for part in gone] == [None, None]
        assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
        assert not any(part._post_accumulate_grad_hooks for part in model.parameters())
    finally:
        gc.enable()


@pytest.mark.filterwarnings("default:KFAC")
def test_a_warning_about_many_layers_is_short():
    model = mlp(*[6] * 40)
    preconditioner = KFAC(model, Brand(100))
    model(torch.randn(5, 6, dtype=DOUBLE)).sum().backward()
    with pytest.warns(UserWarning, match=r"and 76 more, see report\(\)$") as told:
        preconditioner.step()
    assert len(str(told[0].message)) < 300
