"""The public functions give on kernels what they give on torch forms, to rounding: one factor, a batch and a list."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import brandla
from brandla import grouped
from brandla_kernels import OPS, reads_are_free, sketch
from brandla_kernels._kernels import plan
from builders import assert_agree, make_columns, make_eigh, make_root
from calls import ALL, WAITING, WITHOUT_WAITING, K, N, R, list_calls, new_arguments
from oracles import tolerance

# Calls that differ from others only in their work on the host, or take the interpreter long.
LEFT_OUT = {
    *("root_update", "root_update, rule", "root_update, no columns", "root_update, k above n - r", "gram_ema_"),
    *("root_update_, tracked", "damped_solve, smallest", "damped_solve, mean", "is_finite", "largest_eigenvalue"),
    # A refresh of zeros has columns in no order of length. A GPU always orthonormalises in that order, a CPU only if
    # needed: the span is the same, its basis another. Grouped calls are below.
    *("eigh_refresh, begun", "grouped.root_update"),
}
CALLS = [name for name in (*WITHOUT_WAITING, *WAITING) if name not in LEFT_OUT] + [
    *("kron_damped_solve, root right", "kron_damped_solve, nothing held", "damped_power, nothing held"),
]
# Grouped calls that launch other kernels than the rest, or launch the same ones in another way.
GROUPED_CALLS = [
    *("root_update", "root_update, one value each", "root_update, tracked", "eigh_update, one value each"),
    *("damped_solve", "damped_solve, both kinds", "damped_solve, roots", "damped_solve, vectors", "damped_power"),
    *("kron_damped_solve, matrices", "kron_damped_solve, pairs", "kron_damped_power", "eigh_refresh"),
]
UPDATE_OPS = {"cross_gram", "eigh_core", "eigh_rotation", "rotate"}


@pytest.mark.parametrize(
    ("batch", "dtype"), [((), torch.float64), ((2,), torch.float32)], ids=["single float64", "batch float32"]
)
@pytest.mark.parametrize("name", CALLS)
def test_function_on_kernels_agrees_with_torch_forms(name, batch, dtype, device):
    results = ALL[name](new_arguments(dtype, batch).moved(device))
    with brandla.backend("torch"):
        expected = ALL[name](new_arguments(dtype, batch).moved(device))
    # A damped solve divides by the damping, which is 0.1.
    assert_agree(results, expected, tolerance(N, torch.float32 if "half" in name else dtype, 10))


@pytest.mark.parametrize("name", GROUPED_CALLS)
def test_grouped_function_on_kernels_agrees_with_torch_forms(name, device):
    """Two factors of one class, one of another rank, and one with r + k > n."""
    lists, options = tree_map(
        lambda part: part.to(device) if isinstance(part, Tensor) else part,
        list_calls("some of one rank", torch.float32)[name],
    )
    call = partial(getattr(grouped, name.partition(",")[0]), *lists, **options)
    results = call()
    with brandla.backend("torch"):
        expected = call()
    # Three products, each a float32 sum of up to n = 50 terms in another order.
    assert_agree(results, expected, 3e-5)


@pytest.mark.parametrize(
    ("name", "make", "ops"),
    [
        ("eigh_update", make_eigh, {*UPDATE_OPS, "rounded_gram", "cholesky_inverse_core"}),
        ("root_update", make_root, UPDATE_OPS),
    ],
)
def test_a_function_runs_the_kernels_that_a_gpu_would_run(name, make, ops, device, monkeypatch):
    launched, names, original = set(), {op.launch: op.name for op in OPS.values()}, plan.call

    def call(plans, launch, *rest):
        launched.add(names[launch])
        return original(plans, launch, *rest)

    monkeypatch.setattr(plan, "call", call)
    factor, columns = make(N, R, dtype=torch.float32), make_columns(N, K, dtype=torch.float32)
    assert not reads_are_free(columns)
    getattr(brandla, name)(tree_map(lambda part: part.to(device), factor), columns.to(device))
    assert launched == ops


def test_an_op_without_a_kernel_runs_its_torch_form(monkeypatch, device):
    project = OPS["project"]
    monkeypatch.setattr(project, "launch", None)
    basis, columns = make_columns(9, 3).to(device), make_columns(9, 2).to(device)
    assert torch.equal(project(basis, columns), project.torch_form(basis, columns))
    assert project.implementation("cuda") == ("torch", "no Triton kernel is registered for this op")


@pytest.mark.parametrize("case", ["single", "list", "random signs"])
def test_gradients_flow_through_kernels(case, device):
    basis, rhs = make_eigh(12, 3).eigenvectors.to(device), make_columns(12, 2).to(device)
    middle, scale, seed = basis.new_ones(3), basis.new_tensor(0.5), torch.tensor(7, device=device)
    op = OPS["damped_apply"]

    def loss(basis, rhs):
        if case == "random signs":
            result = sketch(basis @ basis.mT + rhs @ rhs.mT, seed, 5)
        elif case == "list":
            (result,) = op([basis], middle[None], scale[None], [rhs])
        else:
            result = op(basis, middle, scale, rhs)
        return result.square().sum()

    inputs = (basis.requires_grad_(), rhs.requires_grad_())
    on_kernels = torch.autograd.grad(loss(*inputs), inputs)
    with brandla.backend("torch"):
        on_torch = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(on_kernels, on_torch)
