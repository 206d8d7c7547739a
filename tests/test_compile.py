"""The public functions under torch.compile: one whole graph where no function waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves

import brandla
from builders import make_columns
from calls import WITHOUT_WAITING, N, given

X = given()
X64 = given(torch.float64)
# Runs the captured graph as it is: what is tested is the capture, by Dynamo and by AOTAutograd.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch._dynamo.reset()


def assert_close(actual: Any, expected: Any) -> None:
    """Check that two results are of one kind and equal up to the order of operations."""
    assert type(actual) is type(expected)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


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
def test_function_compiles_to_one_graph_of_whole_ops(name: str) -> None:
    found: set[str] = set()

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for_compiled, for_eager, call = given(), given(), WITHOUT_WAITING[name]
    # Variants differ in what Dynamo sees, not in what AOTAutograd makes of it.
    backend = aot_autograd(fw_compiler=compiler) if name in WHOLE or "," not in name else "eager"
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    assert_close(compiled(for_compiled), call(for_eager))
    assert_close(for_compiled, for_eager)
    assert {f"brandla.{op}.default" for op in WHOLE.get(name, ())} <= found


def test_sizes_may_be_unknown_to_the_compiler() -> None:
    compiled = torch.compile(
        lambda eigh, rhs: brandla.damped_solve(eigh, rhs, 0.1), fullgraph=True, backend=BACKEND, dynamic=True
    )
    for columns in (3, 5):
        rhs = make_columns(N, columns, dtype=torch.float32)
        assert_close(compiled(X.eigh, rhs), brandla.damped_solve(X.eigh, rhs, 0.1))


def solve(lowrank: Any, columns: Tensor, number: Tensor) -> tuple[Tensor, ...]:
    return (brandla.damped_solve(lowrank, columns, number),)


def update(root: Any, columns: Tensor, number: Tensor) -> tuple[Tensor, ...]:
    return brandla.root_update(root, columns, decay=number, compress="cholesky")


@pytest.mark.parametrize(("function", "factor"), [(solve, X64.eigh), (update, X64.root)], ids=["solve", "update"])
def test_gradients_come_through_a_compiled_function(function: Callable[..., Any], factor: Any) -> None:
    inputs = [part.clone().requires_grad_() for part in (*factor, X64.columns, X64.number)]

    def loss(first: Tensor, second: Tensor, *data: Tensor) -> Tensor:
        return sum(part.square().sum() for part in function(type(factor)(first, second), *data))

    compiled = torch.compile(loss, fullgraph=True, backend=BACKEND)
    assert_close(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["eigh_update", "root_update_"])
def test_exact_updates_compile_around_their_eigendecomposition(name: str) -> None:
    function = getattr(brandla, name)

    def factor() -> brandla.Tracked[Any]:
        return brandla.track(given().eigh if "eigh" in name else given().root)

    compiled = torch.compile(lambda value, columns: function(value, columns, decay=0.9), backend="eager")
    actual, expected = compiled(factor(), X.columns), function(factor(), X.columns, decay=0.9)
    assert type(actual) is type(expected)
    torch.testing.assert_close(*(value.lowrank.dense() for value in (actual, expected)))
