"""The public functions under torch.compile: one whole graph where no function waits for the device.

Graphs run as they are captured: what is tested is the capture, by Dynamo and by AOTAutograd.
"""

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves, tree_map

import brandla
from builders import make_columns
from calls import WITHOUT_WAITING, N, new_arguments


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()


# Ops that must reach a compiler whole.
WHOLE = {
    "root_update, tracked": {"cross_gram", "root_core", "rotate"},
    "orthonormalize": {"gram", "cholesky_inverse_core", "rounded_gram"},
    "damped_solve, eigh": {"damped_inverse"},
    "damped_power": {"damped_apply"},
    "kron_damped_solve": {"kron_damped_inverse"},
    "kron_damped_solve, pair": {"pair_damped_inverse"},
}


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_function_compiles_to_one_graph_of_whole_ops(name):
    found = set()

    def compiler(graph, inputs):
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for_compiled, for_eager, call = new_arguments(), new_arguments(), WITHOUT_WAITING[name]
    # Variants differ in what Dynamo sees, not in what AOTAutograd makes of it.
    backend = aot_autograd(fw_compiler=compiler) if name in WHOLE or "," not in name else "eager"
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    actual, expected = compiled(for_compiled), call(for_eager)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(for_compiled, for_eager)
    assert {f"brandla.{op}.default" for op in WHOLE.get(name, ())} <= found


def test_sizes_may_be_unknown_to_the_compiler():
    def solve(eigh, rhs):
        return brandla.damped_solve(eigh, rhs, 0.1)

    compiled, eigh = torch.compile(solve, fullgraph=True, backend="aot_eager", dynamic=True), new_arguments().eigh
    for columns in (3, 5):
        rhs = make_columns(N, columns, dtype=torch.float32)
        torch.testing.assert_close(compiled(eigh, rhs), solve(eigh, rhs))


@pytest.mark.parametrize("name", ["damped_solve, eigh", "root_update, tensor decay"])
def test_gradients_come_through_a_compiled_function(name):
    x = tree_map(Tensor.requires_grad_, new_arguments(torch.float64))

    def loss(x):
        results = WITHOUT_WAITING[name](x)
        return sum(part.square().sum() for part in ([results] if isinstance(results, Tensor) else results))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    of_compiled, of_eager = (
        torch.autograd.grad(call(x), tree_leaves(x), materialize_grads=True) for call in (compiled, loss)
    )
    torch.testing.assert_close(of_compiled, of_eager)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["eigh_update", "root_update_"])
def test_exact_updates_compile_around_their_eigendecomposition(name):
    def update(value, columns):
        return getattr(brandla, name)(value, columns, decay=0.9)

    one, other = (brandla.track(x.eigh if "eigh" in name else x.root) for x in (new_arguments(), new_arguments()))
    actual = torch.compile(update, backend="eager")(one, new_arguments().columns)
    expected = update(other, new_arguments().columns)
    assert type(actual) is type(expected)
    torch.testing.assert_close(*(value.lowrank.dense() for value in (actual, expected)))
