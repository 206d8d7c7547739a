"""``nn.MultiheadAttention``: the forward pass that takes its place computes the same, and the rows are its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC
from kfac.networks import DENSE, EXACT, assert_dense_step, weighted, with_one

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

SAMPLES, QUERIES, KEYS, D, HEADS = 3, 4, 5, 8, 2
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}

MODULES = {
    "packed": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "dropout": {"dropout": 0.3},
    "apart": {"kdim": 6, "vdim": 7},
    "apart-batch-first-no-bias": {"kdim": 6, "vdim": 7, "batch_first": True, "bias": False},
}
INPUTS = ("self", "keys", "all")
CALLS = {
    "weights": {},
    "weights-of-heads": {"average_attn_weights": False},
    "no-weights": {"need_weights": False},
    "padding": {"need_weights": False, "key_padding_mask": "bool"},
    "padding-float-weights": {"key_padding_mask": "float"},
    "mask": {"need_weights": False, "attn_mask": "bool"},
    "mask-float-weights": {"attn_mask": "float"},
    "mask-of-heads": {"need_weights": False, "attn_mask": "heads"},
    "mask-of-heads-weights": {"attn_mask": "heads"},
    "both": {"need_weights": False, "attn_mask": "bool", "key_padding_mask": "bool"},
    "both-weights": {"attn_mask": "bool", "key_padding_mask": "bool"},
    "causal": {"need_weights": False, "attn_mask": "causal", "is_causal": True},
    "causal-weights": {"attn_mask": "causal", "is_causal": True},
}


def attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(D, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for part in module.parameters():
            part.copy_(torch.randn_like(part) / 2)
    return module


def fitting(options: dict, of: str) -> dict:
    """Sizes of keys and values that allow one tensor to be both, without making the projections packed."""
    if "kdim" not in options or of == "all":
        return options
    return options | {"kdim": 7, "vdim": 7}


def inputs_of(module: nn.MultiheadAttention, of: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, some of them the same tensor."""
    generator = torch.Generator().manual_seed(1)

    def one(length: int, d: int) -> Tensor:
        shape = (SAMPLES, length, d) if module.batch_first else (length, SAMPLES, d)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query = one(QUERIES, D)
    if of == "self" and module.kdim == D:
        return query, query, query
    key = one(KEYS, module.kdim)
    return query, key, one(KEYS, module.vdim) if of == "all" else key


def call_options(options: dict, keys: int) -> dict:
    """Masks in place of their names."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"attn_mask": (QUERIES, keys), "key_padding_mask": (SAMPLES, keys)}
    made = dict(options)
    for name, shape in shapes.items():
        kind = options.get(name)
        if kind == "heads":
            made[name] = torch.randn(SAMPLES * HEADS, *shape, generator=generator, dtype=torch.float64)
        elif kind == "float":
            made[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        elif kind == "causal":
            made[name] = torch.ones(shape, dtype=torch.bool).triu(1)
        elif kind == "bool":
            made[name] = torch.rand(shape, generator=generator) < 0.4
            made[name][:, 0] = False
    return made


def of_module(module: nn.MultiheadAttention, options: dict, of: str) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Outputs, and gradients of all parameters and of the inputs."""
    inputs = inputs_of(module, of)
    distinct = [part.requires_grad_() for part in {id(part): part for part in inputs}.values()]
    torch.manual_seed(7)
    output, weights = module(*inputs, **call_options(options, inputs[1].shape[1 if module.batch_first else 0]))
    module.zero_grad()
    (weighted(output) + (0 if weights is None else weights.square().sum())).backward()
    return output, weights, [part.grad for part in (*module.parameters(), *distinct)]


# Every module with every kind of input, and every call with queries that are keys and that are not.
WAYS = [(module, call, of) for module in MODULES for call in ("weights", "no-weights") for of in INPUTS]
WAYS += [("batch-first", call, of) for call in CALLS for of in INPUTS[:2] if call not in ("weights", "no-weights")]


@pytest.mark.parametrize(("module_name", "call_name", "of"), WAYS)
def test_outputs_and_gradients_are_those_of_the_module(module_name: str, call_name: str, of: str):
    options, call = fitting(MODULES[module_name], of), CALLS[call_name]
    expected = of_module(attention(**options), call, of)
    module = attention(**options)
    preconditioner = KFAC(module, EXACT)
    assert "forward" in vars(module)
    actual = of_module(module, call, of)
    # The same operations in the same order; where queries and keys are apart, gradients of one input are added up in
    # another one.
    torch.testing.assert_close(actual[:2], expected[:2], rtol=0, atol=0)
    torch.testing.assert_close(actual[2], expected[2], **TOLERANCE)
    names = ["q_proj", "k_proj", "v_proj"] if "kdim" in options else ["in_proj"]
    assert [layer.name for layer in preconditioner._layers] == [*names, "out_proj"]
    for layer in preconditioner._layers:
        rows = layer.rows("loss", None)
        torch.testing.assert_close(rows.gradients.mT @ rows.inputs, layer.gradient(), **TOLERANCE)
    assert preconditioner.report().unsupported == {}
    preconditioner.remove()
    assert "forward" not in vars(module)


def test_one_sample_without_a_batch_dimension():
    expected = attention()
    module = attention()
    preconditioner = KFAC(module, EXACT)
    query, key = torch.randn(QUERIES, D, dtype=torch.float64), torch.randn(KEYS, D, dtype=torch.float64)
    padding = torch.tensor([False, True, False, False, True])
    for options in ({}, {"need_weights": False}, {"key_padding_mask": padding}):
        mine, theirs = module(query, key, key, **options), expected(query, key, key, **options)
        # The module does not see that key and value are one here, and projects them one by one.
        torch.testing.assert_close(mine, theirs, **TOLERANCE)
    preconditioner.remove()


def test_what_the_module_refuses_it_refuses_still():
    module = attention()
    preconditioner = KFAC(module, EXACT)
    query = torch.randn(QUERIES, SAMPLES, D, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="is_causal"):
        module(query, query, query, is_causal=True)
    with pytest.raises(AssertionError, match="embedding dimension"):
        module(query[..., :4], query[..., :4], query[..., :4])
    with pytest.raises(RuntimeError, match="attn_mask"):
        module(query, query, query, attn_mask=torch.zeros(2, 2))
    preconditioner.remove()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("of", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_projections_have_the_factors_of_three_linears(sharing: str, of: str, bias: bool):
    """Also where queries and keys are not equally many: each group is normalised by the number of its own rows."""
    module = attention(bias=bias)
    preconditioner = KFAC(module, EXACT, sharing=sharing, clip=None)
    inputs = inputs_of(module, of)
    biases = module.in_proj_bias.chunk(3) if bias else (None,) * 3
    outputs = []
    for part, weight, own in zip(inputs, module.in_proj_weight.chunk(3), biases, strict=True):
        outputs.append(nn.functional.linear(part.transpose(0, 1), weight, own))
        outputs[-1].retain_grad()
    query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in outputs)
    mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    projected = nn.functional.linear(mixed, module.out_proj.weight, module.out_proj.bias)
    projected.square().sum(-1).mean().backward()
    expected = [
        linear_factors(part.transpose(0, 1), out.grad, sharing, bias=bias)
        for part, out in zip(inputs, outputs, strict=True)
    ]
    module.zero_grad()
    module(*inputs)[0].square().sum(-1).mean().backward()
    preconditioner.step()
    state = preconditioner.state_dict()["layers"]["in_proj"]["curvature"]
    for side, index in (("input", 0), ("output", 1)):
        kept = state[side]["state"]
        torch.testing.assert_close(
            kept["dense"] / kept["total"], torch.stack([factors[index] for factors in expected]), **TOLERANCE
        )


def linear_factors(inputs: Tensor, gradients: Tensor, sharing: str, *, bias: bool) -> tuple[Tensor, Tensor]:
    """A and G of a Linear by their definition; inputs (samples, positions, d)."""
    if sharing == "reduce":
        inputs, gradients = inputs.mean(1, keepdim=True), gradients.sum(1, keepdim=True)
    inputs, gradients = inputs.detach().flatten(0, 1), gradients.flatten(0, 1)
    inputs = with_one(inputs) if bias else inputs
    return inputs.T @ inputs / len(inputs), len(inputs) * gradients.T @ gradients


def test_weights_of_their_own_take_their_third_of_the_bias():
    """A step of the module with kdim and vdim is that of three Linears."""
    module = attention(kdim=6, vdim=7)
    preconditioner = KFAC(module, EXACT, **DENSE)
    of_module(module, {}, "all")
    for layer, gradient in zip(preconditioner._layers, module.in_proj_bias.grad.chunk(3), strict=False):
        assert torch.equal(layer.gradient()[:, -1], gradient)
    assert_dense_step(preconditioner)


def test_evaluation_takes_the_path_of_the_module():
    """Without gradients the module is called as it is, with its fast path."""
    module = attention(batch_first=True).eval()
    preconditioner = KFAC(module, EXACT)
    query = torch.randn(SAMPLES, QUERIES, D, dtype=torch.float64)
    with torch.no_grad():
        expected = nn.MultiheadAttention.forward(module, query, query, query)
        actual = module(query, query, query)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    preconditioner.remove()


class Own(nn.MultiheadAttention):
    def forward(self, query: Tensor) -> Tensor:
        return query


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.MultiheadAttention(D, HEADS, add_bias_kv=True), "add_bias_kv"),
        (nn.MultiheadAttention(D, HEADS, add_zero_attn=True), "add_zero_attn"),
        (Own(D, HEADS), "Own has a forward pass of its own"),
    ],
    ids=["bias", "zero", "forward"],
)
def test_what_is_no_plain_attention_is_left_to_the_optimizer(module: nn.Module, reason: str):
    report = KFAC(nn.Sequential(nn.Linear(D, D), module), EXACT).report()
    assert {row.layer for row in report.factors} == {"0"}
    assert reason in report.unsupported["1"]
    assert "1.out_proj" in report.unsupported
