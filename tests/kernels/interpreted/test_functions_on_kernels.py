"""The public functions on the kernels: as on the torch forms, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import brandla
from brandla_kernels import OPS, reads_are_free
from builders import dense, make_columns, make_eigh, make_root, make_svd
from oracles import tolerance

N, R, K = 40, 6, 4


def operands(dtype: torch.dtype, batch: tuple[int, ...], device: torch.device) -> SimpleNamespace:
    """Return every kind of argument."""
    options = {"dtype": dtype, "batch_shape": batch}
    given = {
        **{"root": make_root(N, R, **options), "eigh": make_eigh(N, R, **options), "svd": make_svd(N, 9, R, **options)},
        **{"one_root": make_root(N, R, dtype=dtype), "one_eigh": make_eigh(N, R, dtype=dtype)},
        **{"right": make_root(17, 3, **options), "matrix": make_columns(N, 17, **options)},
        **{"columns": make_columns(N, K, **options), "damping": torch.tensor(0.2, dtype=dtype)},
    }
    return SimpleNamespace(**tree_map(lambda part: part.to(device), given))


def doubled(columns: Tensor) -> Tensor:
    """Return each column twice."""
    return torch.cat([columns, columns], -1)


def single_root(x: SimpleNamespace) -> brandla.LowRankRoot:
    return brandla.LowRankRoot(*(part.float() for part in x.root))


# What comes back, as one dense matrix: eigenvectors of close eigenvalues are not comparable by themselves.
FUNCTIONS: dict[str, Callable[[SimpleNamespace], Tensor]] = {
    "root_update": lambda x: dense(brandla.root_update(x.root, x.columns, decay=0.9, weight=0.5)),
    "root_update, cholesky": lambda x: dense(brandla.root_update(x.root, x.columns, weight=0.5, compress="cholesky")),
    "root_update, half": lambda x: dense(
        brandla.root_update(single_root(x), x.columns.bfloat16(), decay=0.9, compress="cholesky")
    ),
    "root_update_": lambda x: dense(brandla.root_update_(tree_map(torch.clone, x.root), x.columns, decay=0.5)),
    "to_eigh": lambda x: dense(x.root.to_eigh()),
    "orthonormalize": lambda x: torch.cat(brandla.orthonormalize(x.columns), dim=-2),
    "orthonormalize, dependent columns": lambda x: torch.matmul(*brandla.orthonormalize(doubled(x.columns))),
    "eigh_update": lambda x: dense(brandla.eigh_update(x.eigh, x.columns, decay=0.9, weight=0.5)),
    "eigh_update, dependent columns": lambda x: dense(brandla.eigh_update(x.eigh, doubled(x.columns))),
    "eigh_update_": lambda x: dense(brandla.eigh_update_(tree_map(torch.clone, x.eigh), x.columns, decay=0.5)),
    "svd_append": lambda x: dense(brandla.svd_append(x.svd, x.columns, decay=0.9)),
    "damped_solve": lambda x: brandla.damped_solve(x.eigh, x.columns, 0.1),
    "damped_solve, one factor for all": lambda x: brandla.damped_solve(x.one_root, x.columns, 0.1, tail=0.5),
    "kron_damped_solve": lambda x: brandla.kron_damped_solve(x.eigh, x.right, x.matrix, 0.1, 0.2),
    "kron_damped_solve, one for all": lambda x: brandla.kron_damped_solve(
        x.one_eigh, x.right, x.matrix, 0.1, x.damping
    ),
}


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [((), torch.float32), ((), torch.float64), ((2, 2), torch.float32)],
    ids=["single", "single float64", "batch"],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_gives_on_kernels_what_it_gives_on_torch_forms(
    name: str, batch: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    given = operands(dtype, batch, device)
    result = FUNCTIONS[name](given)
    with brandla.backend("torch"):
        expected = FUNCTIONS[name](given)
    precision = torch.float32 if "half" in name else dtype
    # A damped solve divides by the damping, which is 0.1.
    scale = 10 * expected.abs().max()
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance(N, precision, scale))


@pytest.mark.parametrize(
    ("name", "make", "ops"),
    [
        ("eigh_update", make_eigh, {"cross_gram", "rotate", "rounded_gram", "cholesky_inverse_core"}),
        ("root_update", make_root, {"cross_gram", "rotate"}),
    ],
)
def test_a_function_runs_the_kernels_that_a_gpu_would_run(
    name: str, make: Callable[..., Any], ops: set[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def recorded(op: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: launched.append(op) or launch(*args)

    for op in OPS.values():
        if op.launch is not None:
            monkeypatch.setattr(op, "launch", recorded(op.name, op.launch))
    factor, columns = make(N, R, dtype=torch.float32), make_columns(N, K, dtype=torch.float32)
    assert not reads_are_free(columns)
    getattr(brandla, name)(tree_map(lambda part: part.to(device), factor), columns.to(device))
    assert set(launched) == ops


def test_an_op_without_a_kernel_runs_its_torch_form(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    project = OPS["project"]
    monkeypatch.setattr(project, "launch", None)
    basis, columns = make_columns(9, 3).to(device), make_columns(9, 2).to(device)
    assert torch.equal(project(basis, columns), project.torch_form(basis, columns))
    assert project.implementation("cuda") == ("torch", "no Triton kernel is registered for this op")


@pytest.mark.parametrize("listed", [False, True], ids=["single", "grouped"])
def test_gradients_flow_through_kernels(listed: bool, device: torch.device) -> None:
    basis, rhs = make_eigh(12, 3).eigenvectors.to(device), make_columns(12, 2).to(device)
    middle, complement = basis.new_ones(3), basis.new_tensor(0.5)

    def loss(basis: Tensor, rhs: Tensor) -> Tensor:
        op: Callable[..., Any] = OPS["damped_apply"]
        if listed:
            return op([basis], middle[None], complement[None], [rhs])[0].square().sum()
        return op(basis, middle, complement, rhs).square().sum()

    inputs = (basis.requires_grad_(), rhs.requires_grad_())
    on_kernels = torch.autograd.grad(loss(*inputs), inputs)
    with brandla.backend("torch"):
        on_torch = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(on_kernels, on_torch)
