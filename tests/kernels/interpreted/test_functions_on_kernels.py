"""The public functions on the kernels: as on the torch forms, to rounding."""

from __future__ import annotations

from collections.abc import Callable
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

# What comes back, as one dense matrix: eigenvectors of close eigenvalues are not comparable by themselves.
FUNCTIONS: dict[str, Callable[[torch.dtype, tuple[int, ...]], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "root_update": lambda dtype, batch: (
        lambda root, columns: dense(brandla.root_update(root, columns, decay=0.9, weight=0.5)),
        (make_root(N, R, dtype=dtype, batch_shape=batch), make_columns(N, K, dtype=dtype, batch_shape=batch)),
    ),
    "root_update, cholesky": lambda dtype, batch: (
        lambda root, columns: dense(brandla.root_update(root, columns, decay=0.9, weight=0.5, compress="cholesky")),
        (make_root(N, R, dtype=dtype, batch_shape=batch), make_columns(N, K, dtype=dtype, batch_shape=batch)),
    ),
    "root_update, half": lambda dtype, batch: (
        lambda root, columns: dense(brandla.root_update(root, columns, decay=0.9, compress="cholesky")),
        (
            make_root(N, R, dtype=torch.float32, batch_shape=batch),
            make_columns(N, K, dtype=torch.bfloat16, batch_shape=batch),
        ),
    ),
    "root_update_": lambda dtype, batch: (
        lambda root, columns: dense(brandla.root_update_(tree_map(torch.clone, root), columns, decay=0.5)),
        (make_root(N, R, dtype=dtype, batch_shape=batch), make_columns(N, K, dtype=dtype, batch_shape=batch)),
    ),
    "to_eigh": lambda dtype, batch: (
        lambda root: dense(root.to_eigh()),
        (make_root(N, R, dtype=dtype, batch_shape=batch),),
    ),
    "orthonormalize": lambda dtype, batch: (
        lambda panel: torch.cat(brandla.orthonormalize(panel), dim=-2),
        (make_columns(N, K, dtype=dtype, batch_shape=batch),),
    ),
    "orthonormalize, dependent columns": lambda dtype, batch: (
        lambda panel: torch.matmul(*brandla.orthonormalize(torch.cat([panel, panel], -1))),
        (make_columns(N, K, dtype=dtype, batch_shape=batch),),
    ),
    "eigh_update": lambda dtype, batch: (
        lambda eigh, columns: dense(brandla.eigh_update(eigh, columns, decay=0.9, weight=0.5)),
        (make_eigh(N, R, dtype=dtype, batch_shape=batch), make_columns(N, K, dtype=dtype, batch_shape=batch)),
    ),
    "eigh_update, dependent columns": lambda dtype, batch: (
        lambda eigh, columns: dense(brandla.eigh_update(eigh, torch.cat([columns, columns], -1))),
        (make_eigh(N, R, dtype=dtype, batch_shape=batch), make_columns(N, K, dtype=dtype, batch_shape=batch)),
    ),
    "eigh_update_": lambda dtype, batch: (
        lambda eigh, columns: dense(brandla.eigh_update_(tree_map(torch.clone, eigh), columns, decay=0.5)),
        (make_eigh(N, R, dtype=dtype, batch_shape=batch), make_columns(N, K, dtype=dtype, batch_shape=batch)),
    ),
    "svd_append": lambda dtype, batch: (
        lambda svd, columns: dense(brandla.svd_append(svd, columns, decay=0.9)),
        (make_svd(N, 9, R, dtype=dtype, batch_shape=batch), make_columns(N, K, dtype=dtype, batch_shape=batch)),
    ),
    "damped_solve": lambda dtype, batch: (
        lambda eigh, rhs: brandla.damped_solve(eigh, rhs, 0.1),
        (make_eigh(N, R, dtype=dtype, batch_shape=batch), make_columns(N, K, dtype=dtype, batch_shape=batch)),
    ),
    "damped_solve, one factor for all": lambda dtype, batch: (
        lambda root, rhs: brandla.damped_solve(root, rhs, 0.1, tail=0.5),
        (make_root(N, R, dtype=dtype), make_columns(N, K, dtype=dtype, batch_shape=batch)),
    ),
    "kron_damped_solve": lambda dtype, batch: (
        lambda left, right, matrix: brandla.kron_damped_solve(left, right, matrix, 0.1, 0.2),
        (
            make_eigh(N, R, dtype=dtype, batch_shape=batch),
            make_root(17, 3, dtype=dtype, batch_shape=batch),
            make_columns(N, 17, dtype=dtype, batch_shape=batch),
        ),
    ),
    "kron_damped_solve, one factor for all": lambda dtype, batch: (
        lambda left, right, matrix: brandla.kron_damped_solve(left, right, matrix, 0.1, torch.tensor(0.2, dtype=dtype)),
        (
            make_eigh(N, R, dtype=dtype),
            make_root(17, 3, dtype=dtype, batch_shape=batch),
            make_columns(N, 17, dtype=dtype, batch_shape=batch),
        ),
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
    function, arguments = FUNCTIONS[name](dtype, batch)
    arguments = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, arguments)
    result = function(*arguments)
    with brandla.backend("torch"):
        expected = function(*arguments)
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
    middle, complement = (
        torch.ones(3, dtype=basis.dtype, device=device),
        torch.tensor(0.5, dtype=basis.dtype, device=device),
    )

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
