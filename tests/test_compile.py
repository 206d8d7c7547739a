"""The public functions under torch.compile: one whole graph where no function waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._pytree import tree_leaves, tree_map

import brandla
from brandla_kernels import gram_ema_
from builders import CHOLESKY_UPDATE, make_columns
from test_sync_free import CALLS, COLUMNS, DAMPING, EIGH, ROOT, N

# What promises never to wait for the device.
TRACED = CALLS | {
    "root_update_, tracked": (CHOLESKY_UPDATE.in_place, (brandla.track(ROOT), COLUMNS)),
    "root_update, half precision": (CHOLESKY_UPDATE, (ROOT, COLUMNS.bfloat16())),
    "orthonormalize, a batch": (brandla.orthonormalize, (COLUMNS.expand(3, *COLUMNS.shape).clone(),)),
    "orthonormalize, float64": (brandla.orthonormalize, (COLUMNS.double(),)),
    "gram_ema_": (gram_ema_, (torch.eye(N), COLUMNS, 0.9, 0.1)),
}
BACKENDS = ("eager", "aot_eager")


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch._dynamo.reset()


def cloned(arguments: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)


def assert_close(actual: Any, expected: Any) -> None:
    """Check that two results are of one kind and equal up to the order of operations."""
    assert type(actual) is type(expected)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def ops_in(function: Callable[..., Any], arguments: Any) -> set[str]:
    """Return the names of the brandla ops in the graph that reaches a compiler."""
    found: set[str] = set()

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.update(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("brandla."))
        return graph.forward

    torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(*arguments)
    return {name.removeprefix("brandla.").removesuffix(".default") for name in found}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRACED)
def test_function_compiles_to_one_graph(name: str, backend: str) -> None:
    """Both backends run the captured graph as it is: what is tested is the capture, by Dynamo and by AOTAutograd."""
    function, arguments = TRACED[name]
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    written, expected_written = cloned(arguments), cloned(arguments)
    assert_close(compiled(*written), function(*expected_written))
    assert_close(written, expected_written)


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("root_update, tracked", {"cross_gram", "root_core", "rotate"}),
        ("orthonormalize, a batch", {"gram", "cholesky_inverse_core", "rounded_gram"}),
        ("damped_solve, eigh", {"damped_apply"}),
        ("kron_damped_solve", {"kron_damped_apply"}),
    ],
)
def test_ops_stay_whole_in_the_graph(name: str, ops: set[str]) -> None:
    assert ops <= ops_in(*TRACED[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_may_be_unknown_to_the_compiler(backend: str) -> None:
    compiled = torch.compile(
        lambda eigh, rhs: brandla.damped_solve(eigh, rhs, 0.1), fullgraph=True, backend=backend, dynamic=True
    )
    for columns in (3, 5):
        rhs = make_columns(N, columns, dtype=torch.float32)
        assert_close(compiled(EIGH, rhs), brandla.damped_solve(EIGH, rhs, 0.1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [EIGH, ROOT], ids=["eigh", "root"])
def test_gradients_come_through_a_compiled_solve(factor: Any, backend: str) -> None:
    inputs = [part.detach().double().requires_grad_() for part in (*factor, COLUMNS, DAMPING)]

    def loss(values: Tensor, basis: Tensor, rhs: Tensor, damping: Tensor) -> Tensor:
        return brandla.damped_solve(type(factor)(values, basis), rhs, damping).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    assert_close(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_come_through_a_compiled_update(backend: str) -> None:
    inputs = [part.detach().double().requires_grad_() for part in (*ROOT, COLUMNS, DAMPING)]

    def loss(root: Tensor, gram: Tensor, columns: Tensor, decay: Tensor) -> Tensor:
        new = brandla.root_update(brandla.LowRankRoot(root, gram), columns, decay=decay, compress="cholesky")
        return new.root.square().sum() + new.gram.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    assert_close(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tracked", [False, True], ids=["plain", "tracked"])
@pytest.mark.parametrize("name", ["eigh_update", "root_update", "eigh_update_", "root_update_"])
def test_exact_updates_compile_around_their_eigendecomposition(name: str, tracked: bool) -> None:
    function, factor = getattr(brandla, name), EIGH if "eigh" in name else ROOT
    factor = brandla.track(factor) if tracked else factor
    compiled = torch.compile(lambda value, columns: function(value, columns, decay=0.9), backend="eager")
    actual, expected = (call(cloned(factor), COLUMNS) for call in (compiled, lambda *a: function(*a, decay=0.9)))
    assert type(actual) is type(expected)
    torch.testing.assert_close(*((value.lowrank if tracked else value).dense() for value in (actual, expected)))
