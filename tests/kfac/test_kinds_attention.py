"""``nn.MultiheadAttention``: the watched forward pass computes the same, and the rows make up the gradients."""

from functools import partial

import pytest
import torch
from torch import nn

from brandla.kfac import KBFGS, KFAC
from kfac.networks import DENSE, EXACT, assert_near, weighted

SAMPLES, QUERIES, KEYS, D, HEADS = 3, 4, 5, 8, 2
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}

MODULES = {
    "packed": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "dropout": {"dropout": 0.3},
    "apart": {"kdim": 7, "vdim": 7},
    "apart-batch-first-no-bias": {"kdim": 7, "vdim": 7, "batch_first": True, "bias": False},
    "unequal": {"kdim": 6, "vdim": 7},
}
INPUTS = ("self", "keys", "all")
MASKED = {
    "plain": {},
    "padding": {"key_padding_mask": "bool"},
    "padding-float": {"key_padding_mask": "float"},
    "mask": {"attn_mask": "bool"},
    "mask-float": {"attn_mask": "float"},
    "mask-of-heads": {"attn_mask": "heads"},
    "both": {"attn_mask": "bool", "key_padding_mask": "bool"},
    "causal": {"attn_mask": "causal", "is_causal": True},
}
CALLS = {f"{name}{'-weights' * own}": {"need_weights": own, **MASKED[name]} for name in MASKED for own in (True, False)}
CALLS["weights-of-heads"] = {"average_attn_weights": False}


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(D, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for part in module.parameters():
            part.copy_(torch.randn_like(part) / 2)
    return module


def inputs_of(module, of):
    """Return queries, keys and values, some of them the same tensor."""
    generator = torch.Generator().manual_seed(1)

    def draw(length, d):
        batch_shape = (SAMPLES, length, d) if module.batch_first else (length, SAMPLES, d)
        shape = (length, d) if of == "one-sample" else batch_shape
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query = draw(QUERIES, D)
    if of == "self" and module.kdim == D:
        return query, query, query
    key = draw(KEYS, module.kdim)
    return query, key, draw(KEYS, module.vdim) if of in ("all", "one-sample") else key


MASKS = {
    # True masks a key out; the first key always stays.
    "bool": lambda *shape: (torch.rand(shape) < 0.4).index_fill(1, torch.tensor([0]), False),
    "float": partial(torch.randn, dtype=torch.float64),
    "heads": partial(torch.randn, SAMPLES * HEADS, dtype=torch.float64),
    "causal": lambda *shape: torch.ones(shape, dtype=torch.bool).triu(1),
}


def outputs_and_gradients(module, options, of):
    """Return the outputs, and the gradients of all parameters and inputs."""
    inputs = inputs_of(module, of)
    distinct = [part.requires_grad_() for part in {id(part): part for part in inputs}.values()]
    keys = inputs[1].shape[1 if module.batch_first else 0]
    shapes = {"attn_mask": (QUERIES, keys), "key_padding_mask": (SAMPLES, keys)}
    torch.manual_seed(7)
    call = {name: MASKS[value](*shapes[name]) if name in shapes else value for name, value in options.items()}
    output, weights = module(*inputs, **call)
    module.zero_grad()
    (weighted(output) + (0 if weights is None else weights.square().sum())).backward()
    return output, weights, [part.grad for part in (*module.parameters(), *distinct)]


# Every module with every kind of input, and every call with queries that are the keys or differ from them.
PLAIN = "plain", "plain-weights"
WAYS = [(module, call, of) for module in MODULES if module != "unequal" for call in PLAIN for of in INPUTS]
WAYS += [(module, call, of) for module, of in (("unequal", "all"), ("packed", "one-sample")) for call in PLAIN]
WAYS += [("batch-first", call, of) for call in CALLS for of in INPUTS[:2] if call not in PLAIN]


@pytest.mark.parametrize(("module_name", "call_name", "of"), WAYS)
def test_outputs_and_gradients_are_those_of_the_module(module_name, call_name, of):
    options, call = MODULES[module_name], CALLS[call_name]
    expected = outputs_and_gradients(attention(**options), call, of)
    module = attention(**options)
    preconditioner = KFAC(module, EXACT)
    assert "forward" in vars(module)
    actual = outputs_and_gradients(module, call, of)
    # The operations and their order are the same. If queries and keys differ, the gradients of an input are summed in
    # another order.
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


def test_the_module_still_refuses_bad_arguments():
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


class Linears(nn.Module):
    """The same attention made of four Linears, without a mask, samples first."""

    def __init__(self, module):
        super().__init__()
        parts = {name: part.detach().clone() for name, part in module.named_parameters()}
        weights, biases = projections(parts, "weight"), projections(parts, "bias")
        self.linears = nn.ModuleList()
        for weight, bias in zip(weights, biases or [None] * 4, strict=True):
            linear = nn.Linear(*weight.shape[::-1], bias=bias is not None)
            linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
            self.linears.append(linear.requires_grad_())

    def forward(self, *inputs):
        query, key, value = (
            linear(part.transpose(0, 1)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear, part in zip(self.linears, inputs, strict=False)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return (self.linears[3](mixed),)


def projections(parts, kind):
    """Return weights or biases of queries, keys, values and outputs, or their gradients."""
    found = [part for name, part in parts.items() if name.endswith(kind)]
    return [*found[0].chunk(3), *found[1:]] if f"in_proj_{kind}" in parts else found


@pytest.mark.parametrize("of", INPUTS)
@pytest.mark.parametrize("name", ["packed", "no-bias", "apart"])
@pytest.mark.parametrize(("strategy", "sharing"), [(EXACT, "expand"), (EXACT, "reduce"), (KBFGS(), "expand")])
def test_steps_are_those_of_linears(strategy, name, of, sharing):
    """Also if queries and keys differ in number, and if each weight has a third of one bias."""
    module, found = attention(**MODULES[name]), []
    for model in (module, Linears(module)):
        preconditioner = KFAC(model, strategy, sharing=sharing, **DENSE)
        for take in (KFAC.step, KFAC.second_pass, KFAC.step)[: None if isinstance(strategy, KBFGS) else 1]:
            model.zero_grad()
            model(*inputs_of(module, of))[0].square().sum(-1).mean().backward()
            take(preconditioner)
            if take is KFAC.step:
                torch.optim.SGD(model.parameters(), 0.1).step()
        found.append({key: part.grad for key, part in model.named_parameters()})
    for kind in ("weight", "bias"):
        assert_near(*(projections(gradients, kind) for gradients in found), 1e-8)


def test_evaluation_takes_the_path_of_the_module():
    """Without gradients, the module's own forward pass runs, with its fast path."""
    module = attention(batch_first=True).eval()
    preconditioner = KFAC(module, EXACT)
    query = torch.randn(SAMPLES, QUERIES, D, dtype=torch.float64)
    with torch.no_grad():
        expected = nn.MultiheadAttention.forward(module, query, query, query)
        actual = module(query, query, query)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    preconditioner.remove()
