"""The public functions on the kernels, for one factor, a batch and a list: as on the torch forms, to rounding."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_map

import brandla
from brandla import grouped
from brandla_kernels import OPS, reads_are_free, sketch
from brandla_kernels._kernels import plan
from builders import assert_agree, make_columns, make_eigh, make_root
from calls import ALL, WAITING, WITHOUT_WAITING, K, N, R, given
from oracles import tolerance

# These differ from others in what stays on the host, or take the interpreter long.
LEFT_OUT = {
    *("root_update", "root_update, rule", "root_update, no columns", "root_update, k above n - r", "gram_ema_"),
    *("root_update_, tracked", "damped_solve, smallest", "damped_solve, mean", "is_finite", "largest_eigenvalue"),
    # From nothing the columns come in no order of length. On a GPU they are always orthonormalised by length, on a CPU
    # where that is needed: the same span in another basis. Lists have calls of their own.
    *("eigh_refresh, begun", "grouped.root_update"),
}
CALLS = [name for name in (*WITHOUT_WAITING, *WAITING) if name not in LEFT_OUT] + [
    *("kron_damped_solve, root right", "kron_damped_solve, nothing held", "damped_power, nothing held"),
]
# Two factors of one class, one of another rank, and one with r + k > n.
SIZES = [(50, 8, 5), (41, 8, 5), (50, 6, 5), (12, 8, 5)]
FLOAT32 = {"dtype": torch.float32}
ROOTS = [make_root(n, r, **FLOAT32) for n, r, _ in SIZES]
EIGHS = [make_eigh(n, r, **FLOAT32) for n, r, _ in SIZES]
COLUMNS = [make_columns(n, k, **FLOAT32) for n, _, k in SIZES]
LISTS = {
    **{"roots": ROOTS, "eighs": EIGHS, "columns": COLUMNS, "vectors": [each[:, 0] for each in COLUMNS]},
    **{"tracked": list(map(brandla.track, ROOTS)), "widths": [each[:, : i + 1] for i, each in enumerate(COLUMNS)]},
    "matrices": [make_columns(p[0], q[0], **FLOAT32) for p, q in zip(SIZES, SIZES[::-1], strict=True)],
    "each": [torch.tensor(number) for number in (0.9, 0.8, 0.7, 0.6)],
    "pairs": list(zip(COLUMNS, COLUMNS[::-1], strict=True)),
}
OF_LISTS = {
    "root_update": lambda x: grouped.root_update(x.roots, x.columns, decay=x.each, weight=0.1),
    "root_update, cholesky": lambda x: grouped.root_update(x.tracked, x.columns, decay=0.9, compress="cholesky"),
    "root_update, both": lambda x: grouped.root_update(x.roots, x.columns, compress=["eigh", "cholesky"] * 2),
    "eigh_update": lambda x: grouped.eigh_update(x.eighs, x.columns, decay=0.9, weight=x.each),
    "damped_solve, eigh": lambda x: grouped.damped_solve(x.eighs, x.columns, x.each, tail="smallest"),
    "damped_solve, root": lambda x: grouped.damped_solve(x.roots, x.widths, 0.1),
    "damped_solve, both": lambda x: grouped.damped_solve([*x.roots[:2], *x.eighs[2:]], x.columns, 0.1),
    "damped_solve, vectors": lambda x: grouped.damped_solve(x.roots, x.vectors, 0.1),
    "damped_power": lambda x: grouped.damped_power(x.roots, x.columns, 0.1, [-1, -0.5, 2, 1]),
    "kron_damped_solve": lambda x: grouped.kron_damped_solve(x.eighs, x.roots[::-1], x.matrices, 0.1, x.each),
    "eigh_refresh": lambda x: grouped.eigh_refresh(x.eighs, x.matrices, decay=0.9, weight=x.each),
    "kron_damped_power": lambda x: grouped.kron_damped_power(x.eighs, x.roots[::-1], x.matrices, x.each, -0.5),
    "kron_damped_solve, pairs": lambda x: grouped.kron_damped_solve(x.eighs, x.roots[::-1], x.pairs, 0.1, 0.2),
}
UPDATE = {"cross_gram", "eigh_core", "eigh_rotation", "rotate"}


@pytest.mark.parametrize(
    ("batch", "dtype"), [((), torch.float64), ((2,), torch.float32)], ids=["single float64", "batch float32"]
)
@pytest.mark.parametrize("name", CALLS)
def test_function_gives_on_kernels_what_it_gives_on_torch_forms(name, batch, dtype, device):
    results = ALL[name](given(dtype, batch).moved(device))
    with brandla.backend("torch"):
        expected = ALL[name](given(dtype, batch).moved(device))
    # A damped solve divides by the damping, which is 0.1.
    assert_agree(results, expected, tolerance(N, torch.float32 if "half" in name else dtype, 10))


@pytest.mark.parametrize("name", OF_LISTS)
def test_function_of_lists_gives_on_kernels_what_it_gives_on_torch_forms(name, device):
    lists = SimpleNamespace(**tree_map(lambda part: part.to(device), LISTS))
    results = OF_LISTS[name](lists)
    with brandla.backend("torch"):
        expected = OF_LISTS[name](lists)
    # Sums of length up to n = 50 in float32, in a different order, through three products.
    assert_agree(results, expected, 3e-5)


@pytest.mark.parametrize(
    ("name", "make", "ops"),
    [
        ("eigh_update", make_eigh, {*UPDATE, "rounded_gram", "cholesky_inverse_core"}),
        ("root_update", make_root, UPDATE),
    ],
)
def test_a_function_runs_the_kernels_that_a_gpu_would_run(name, make, ops, device, monkeypatch):
    launched, names, own = set(), {op.launch: op.name for op in OPS.values()}, plan.call

    def call(plans, launch, *rest):
        launched.add(names[launch])
        return own(plans, launch, *rest)

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
