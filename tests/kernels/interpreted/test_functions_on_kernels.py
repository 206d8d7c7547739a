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
from brandla_kernels._kernels import plan
from builders import assert_agree, make_columns, make_eigh, make_root
from calls import ALL, WAITING, WITHOUT_WAITING, K, N, R, given
from oracles import tolerance

# These differ from others in what stays on the host, or take the interpreter long.
LEFT_OUT = {
    *("root_update", "root_update, rule", "root_update, no columns", "root_update, k above n - r", "gram_ema_"),
    *("root_update_, tracked", "damped_solve, smallest", "damped_solve, mean", "is_finite", "largest_eigenvalue"),
    # From nothing the columns come in no order of length. On a GPU they are always orthonormalised by length, on a CPU
    # where that is needed: the same span in another basis.
    "eigh_refresh, begun",
}
UPDATE = {"cross_gram", "eigh_core", "eigh_rotation", "rotate"}
CALLS = {
    name: ALL[name] for name in (*WITHOUT_WAITING, *WAITING, "kron_damped_solve, root right") if name not in LEFT_OUT
}


@pytest.mark.parametrize(
    ("batch", "dtype"), [((), torch.float64), ((2,), torch.float32)], ids=["single float64", "batch float32"]
)
@pytest.mark.parametrize("name", CALLS)
def test_function_gives_on_kernels_what_it_gives_on_torch_forms(
    name: str, batch: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if batch and "grouped" in name:
        pytest.skip("lists hold no batches")
    results = CALLS[name](given(dtype, batch).moved(device))
    with brandla.backend("torch"):
        expected = CALLS[name](given(dtype, batch).moved(device))
    # A damped solve divides by the damping, which is 0.1.
    assert_agree(results, expected, tolerance(N, torch.float32 if "half" in name else dtype, 10))


@pytest.mark.parametrize(
    ("name", "make", "ops"),
    [
        ("eigh_update", make_eigh, {*UPDATE, "rounded_gram", "cholesky_inverse_core"}),
        ("root_update", make_root, UPDATE),
    ],
)
def test_a_function_runs_the_kernels_that_a_gpu_would_run(
    name: str, make: Callable[..., Any], ops: set[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, names, own = set(), {op.launch: op.name for op in OPS.values()}, plan.call

    def call(plans: Any, launch: Any, *rest: Any) -> Any:
        launched.add(names[launch])
        return own(plans, launch, *rest)

    monkeypatch.setattr(plan, "call", call)
    factor, columns = make(N, R, dtype=torch.float32), make_columns(N, K, dtype=torch.float32)
    assert not reads_are_free(columns)
    getattr(brandla, name)(tree_map(lambda part: part.to(device), factor), columns.to(device))
    assert launched == ops


def test_an_op_without_a_kernel_runs_its_torch_form(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    project = OPS["project"]
    monkeypatch.setattr(project, "launch", None)
    basis, columns = make_columns(9, 3).to(device), make_columns(9, 2).to(device)
    assert torch.equal(project(basis, columns), project.torch_form(basis, columns))
    assert project.implementation("cuda") == ("torch", "no Triton kernel is registered for this op")


@pytest.mark.parametrize("listed", [False, True], ids=["single", "grouped"])
def test_gradients_flow_through_kernels(listed: bool, device: torch.device) -> None:
    basis, rhs = make_eigh(12, 3).eigenvectors.to(device), make_columns(12, 2).to(device)
    middle, scale = basis.new_ones(3), basis.new_tensor(0.5)

    def loss(basis: Tensor, rhs: Tensor) -> Tensor:
        op: Callable[..., Any] = OPS["damped_apply"]
        if listed:
            return op([basis], middle[None], scale[None], [rhs])[0].square().sum()
        return op(basis, middle, scale, rhs).square().sum()

    inputs = (basis.requires_grad_(), rhs.requires_grad_())
    on_kernels = torch.autograd.grad(loss(*inputs), inputs)
    with brandla.backend("torch"):
        on_torch = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(on_kernels, on_torch)
