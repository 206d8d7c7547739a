"""The ops of brandla_kernels: values beside the formulas, the dispatcher, gradients, and PyTorch's own checks."""

import importlib
import math
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import brandla
import brandla_kernels
from brandla_kernels import OPS
from builders import unchanged
from op_cases import VARIANTS, eigh_core_operands, grouped, matrix, op_of, operands, root_core_operands, run

GROUPED = [name for name, op in OPS.items() if op.signature.lists]
IN_PLACE = [name for name, op in OPS.items() if op.signature.writes]
DIFFERENTIABLE = [name for name in OPS if name not in IN_PLACE]
VARIED = (*DIFFERENTIABLE, *VARIANTS)
BOTH_FORMS = [(name, False) for name in OPS] + [(name, True) for name in GROUPED]
# n, r, k of the problems of a list.
PROBLEMS = [(13, 4, 3), (9, 2, 5), (6, 0, 2), (7, 3, 0)]


def registered(name, *, is_list=False):
    """The registered op, or the one over lists."""
    return getattr(torch.ops.brandla, OPS[name].signature.grouped_name if is_list else name).default


def lists_of_operands(case):
    return grouped(case, [operands(case, *size, "plain", torch.float64) for size in PROBLEMS])


def is_varied(leaf):
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def requiring_grad(arguments):
    return tuple(tree_map(lambda leaf: leaf.clone().requires_grad_() if is_varied(leaf) else leaf, list(arguments)))


# --- Values


@pytest.mark.parametrize("batch_shape", [(), (1,)], ids=["one", "batch"])
def test_gram_ema_keeps_nan_that_meets_a_zero(batch_shape):
    for decay in (0.0, 1.0):
        matrix, columns = torch.ones(*batch_shape, 5, 5), torch.ones(*batch_shape, 5, 2)
        (columns if decay else matrix).fill_(math.nan)
        brandla_kernels.gram_ema_(matrix, columns, decay, 1 - decay)
        assert matrix.isnan().all()


def test_gram_of_many_slabs_equals_the_gram_of_one():
    panel = matrix(5000, 130, "plain", torch.float32, 0)
    exact = panel.double().mT @ panel.double()
    torch.testing.assert_close(brandla_kernels.gram(panel), exact, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("few", [True, False], ids=["few columns", "many"])
def test_rounded_products_of_a_million_rows_are_good_to_those_of_a_slab(few):
    """A sum of m products is within m·ε/2. One product over all rows is wrong by 3000 ε for these columns."""
    (r, k), slab = ((5, 3), 1024) if few else ((16, 16), 4096)
    generator = torch.Generator().manual_seed(0)
    root, columns = (1 + torch.randn(10**6, width, generator=generator) for width in (r, k))
    cross, gram = brandla_kernels.cross_gram(root, columns)
    rounded = brandla_kernels.rounded_gram(columns)
    expected = columns.double().mT @ columns.double()
    terms = columns.double().norm(dim=0).square().max()
    allowed = slab / 2 * torch.finfo(torch.float32).eps
    assert (gram - expected).abs().max() <= allowed * terms
    assert (rounded - expected).abs().max() <= allowed * terms
    terms = root.double().norm(dim=0).max() * terms.sqrt()
    assert (cross - root.double().mT @ columns.double()).abs().max() <= allowed * terms


def test_cross_gram_of_an_empty_root_takes_no_second_look():
    """A factor starts at 0: its first update is as fast as the others."""
    module = importlib.import_module("brandla_kernels.cross_gram")
    with mock.patch.object(module, "sum_of_slabs", wraps=module.sum_of_slabs) as sums:
        OPS["cross_gram"](torch.zeros(9, 3), torch.ones(9, 2))
    assert [call.args[2] for call in sums.call_args_list] == [torch.float32, torch.float32]


# --- As torch ops


# While it traces, torch 2.14 reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(("name", "is_list"), BOTH_FORMS)
def test_op_passes_the_check_of_torch(name, is_list):
    arguments = lists_of_operands(name) if is_list else operands(name, 13, 4, 3, "plain", torch.float64)
    op = registered(name, is_list=is_list)
    # All lists go the same way through AOTAutograd: two ops stand for all.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = checks[:3] if is_list and name not in ("project", "rotate_") else checks
    torch.library.opcheck(op, requiring_grad(arguments) if name in DIFFERENTIABLE else arguments, test_utils=checks)


@pytest.mark.parametrize("name", OPS)
def test_forced_torch_backend_gives_the_same_bits(name):
    first, second = (operands(name, 13, 4, 3, "plain", torch.float64) for _ in range(2))
    dispatched = run(registered(name), first)
    with brandla.backend("torch"):
        forced = run(OPS[name], second)
        assert OPS[name].implementation("cpu") == ("torch", "forced by brandla.backend('torch')")
    assert "forced" not in OPS[name].implementation("cpu")[1]
    for one, other in zip(dispatched, forced, strict=True):
        assert torch.equal(one, other)


def test_op_takes_its_arguments_by_name():
    basis, columns = operands("project", 13, 4, 3, "plain", torch.float64)
    assert torch.equal(brandla_kernels.project(basis=basis, columns=columns), brandla_kernels.project(basis, columns))


# --- Gradients


# Arguments of the ops on small cores, from panels in place of their Gram matrices, ρ and w.
CORES = {
    "root_core": lambda F, A, *numbers: (*root_core_operands(F, A)[:3], *numbers, *root_core_operands(F, A)[5:]),
    "eigh_core": lambda F, A, *numbers: (*eigh_core_operands(F, A)[:3], *numbers),
    "cholesky_inverse_core": lambda F, A, *_: (F.mT @ F, F.norm(dim=-2).detach(), 1e-10),
}


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, layout) for case in VARIED for layout in ("plain", "batched") if not case.endswith("core")]
    + [(name, "list") for name in GROUPED if name in DIFFERENTIABLE]
    + [(name, "core") for name in CORES],
)
def test_gradient_is_that_of_finite_differences(case, layout):
    name = op_of(case)
    op = registered(name, is_list=layout == "list")
    build = CORES[name] if layout == "core" else lambda *given: given
    if layout == "core":
        panels = (matrix(8, width, "plain", torch.float64, width) for width in (3, 2))
        arguments = [*panels, *torch.tensor([0.9, 0.25], dtype=torch.float64)]
    else:
        arguments = lists_of_operands(name) if layout == "list" else operands(case, 6, 3, 2, layout, torch.float64)
    leaves, structure = tree_flatten(list(arguments))

    def call(*inputs):
        varied = iter(inputs)
        given = tree_unflatten([next(varied) if is_varied(leaf) else leaf for leaf in leaves], structure)
        return tuple(part for part in tree_leaves(op(*build(*given))) if part.is_floating_point())

    torch.autograd.gradcheck(call, [*filter(is_varied, tree_leaves(requiring_grad(arguments)))], fast_mode=True)


@pytest.mark.parametrize("case", ["project", "cross_gram"])
def test_gradient_of_half_precision_data_is_in_half_precision(case):
    inputs = requiring_grad(operands(case, 9, 3, 2, "plain", torch.float32, half=torch.bfloat16))
    sum(part.sum() for part in run(registered(case), inputs)).backward()
    assert [part.grad.dtype for part in inputs] == [part.dtype for part in inputs]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_gradient_is_lost_where_autograd_is_passed_over(requires_grad):
    """A call with a parameter goes through the dispatcher on a CPU too."""
    basis, columns = torch.nn.Parameter(torch.randn(9, 3), requires_grad), torch.randn(9, 2)
    assert brandla_kernels.project(basis, columns).requires_grad == requires_grad
    with torch.no_grad():
        assert not brandla_kernels.project(basis, columns).requires_grad


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_op_that_overwrites_refuses_to_lose_a_gradient(name):
    arguments = requiring_grad(operands(name, 9, 3, 2, "plain", torch.float32))
    for call in (registered(name), OPS[name]):
        with unchanged(arguments), pytest.raises(RuntimeError, match=rf"brandla::{name}: .*no_grad"):
            call(*arguments)
    with torch.no_grad():
        registered(name)(*arguments)


# --- Bad input

LONG = torch.zeros(10, 2)


def floats(matrices):
    return [matrix.float() for matrix in matrices]


# Op, function that spoils its operands, error, and parts of its message, with ` … ` between.
BAD_CALLS = {
    "rows": ("project", lambda U, A: (U, LONG), ValueError, "columns must … (n, k) with n = 9; got (10, 2)"),
    "vector": ("project", lambda U, A: (U, A[:, 0]), ValueError, "columns must … (n, k) with n = 9; got (9,)"),
    "vector first": ("project", lambda U, A: (U[0], A), ValueError, "basis must … (n, r); got (3,)"),
    "batch": ("project", lambda U, A: (U, A.expand(5, 9, 2)), ValueError, "columns must … (n, k) … got (5, 9, 2)"),
    "batch of the basis": ("project", lambda U, A: (U.expand(5, 9, 3), A), ValueError, "columns must … (5, n, k)"),
    "batch of a number": ("damped_apply", lambda U, H, b, V: (U, H, b.expand(2), V), ValueError, "(); got (2,)"),
    "either shape": ("damped_apply", lambda U, H, *rest: (U, H[1:], *rest), ValueError, "middle … (r,) or (r, r)"),
    "rank": ("rotate", lambda U, P, V, W: (U, P, V[1:], W), ValueError, "basis_rotation … (r, s) with r = 3"),
    "not square": ("rotate_", lambda U, P, V, W: (U, P, V[:, 1:], W), ValueError, "(r, r) with r = 3; got (3, 2)"),
    "no square": ("gram_ema_", lambda M, *rest: (M[:, 1:], *rest), ValueError, "matrix must … (n, n); got (9, 8)"),
    "rows, overwritten": ("rotate_", lambda U, P, V, W: (U, LONG, V, W), ValueError, "panel must … got (10, 2)"),
    "memory": ("rotate_", lambda U, *rest: (U[:1].expand(9, 3), *rest), ValueError, "basis … share memory … (0, 1)"),
    "precision": ("rotate", lambda U, P, *rest: (U, P.double(), *rest), TypeError, "panel … dtype of basis … float64"),
    "small precision": ("rotate", lambda U, P, V, W: (U, P, V.double(), W), TypeError, "basis_rotation … of basis"),
    "half a basis": ("project", lambda U, A: (U.bfloat16(), A), TypeError, "basis … float32 or … got torch.bfloat16"),
    "half and float64": ("project", lambda U, A: (U.double(), A.bfloat16()), TypeError, "of basis … torch.bfloat16"),
    "other data": ("cross_gram", lambda F, A: (F, A.double()), TypeError, "columns … dtype of root, torch.float32"),
    "whole numbers": ("project", lambda U, A: (U, A.long()), TypeError, "columns … torch.float16; got torch.int64"),
    "device": ("rotate_", lambda U, P, V, W: (U, P, V.to("meta"), W), ValueError, "basis_rotation … cpu; got meta"),
}
BAD_LISTS = {
    "lengths": ("project", lambda U, A: (U, A[:3]), ValueError, "of one length … {'basis': 4, 'columns': 3}"),
    "no problems": ("project", lambda U, A: ([], []), ValueError, "at least 1 … {'basis': 0, 'columns': 0}"),
    "rows": ("project", lambda U, A: (U, [A[0], LONG.double(), *A[2:]]), ValueError, "columns[1] … n = 9; got (10, 2)"),
    "a batch": ("project", lambda U, A: ([U[0][None], *U[1:]], A), ValueError, "basis[0] … (n, r); got (1, 13, 4)"),
    "two": ("project", lambda U, A: (floats(U), [*floats(A[:3]), A[3].half()]), TypeError, "columns[3] … columns[0]"),
    "precision": ("rotate", lambda U, P, V, W: (U, floats(P), V, W), TypeError, "panel[0] … of basis, torch.float64"),
    "small stack": ("rotate", lambda U, P, V, W: (U, P, V[:, 1:], W), ValueError, "(4, r, s) with r = 4 … (4, 3, 5)"),
    "large stack": ("damped_apply", lambda U, H, *rest: (U, H.repeat(1, 2), *rest), ValueError, "(4, r, r) … (4, 8)"),
    "stack of too few": ("rotate_", lambda U, P, V, W: (U, P, V[:3], W), ValueError, "(4, r, r) … got (3, 4, 4)"),
    "memory": ("rotate_", lambda U, *rest: ([*U[:3], U[3][:1].expand(7, 3)], *rest), ValueError, "basis[3] … memory"),
}

SEED = torch.tensor(1)
BAD_SKETCHES = {
    "seed": ("sketch", lambda X, *_: (X, SEED.float(), 3), TypeError, "seed … dtype torch.int64; got torch.float32"),
    "two seeds": ("sketch", lambda X, *_: (X, SEED.expand(2), 3), ValueError, "seed … one element; got shape (2,)"),
    "no seed": ("sketch", lambda X, *_: (X, SEED.expand(0), 3), ValueError, "seed … one element; got shape (0,)"),
    "seed elsewhere": ("sketch", lambda X, *_: (X, SEED.to("meta"), 3), ValueError, "seed … device … cpu; got meta"),
    "width": ("sketch", lambda X, *_: (X, SEED, -1), ValueError, "width must be at least 0; got -1"),
    "problem": ("sketch", lambda X, *_: (X, SEED, 3, -2), ValueError, "problem must be at least 0; got -2"),
}
BAD_CALLS |= BAD_SKETCHES
BAD_LISTS |= BAD_SKETCHES


@pytest.mark.parametrize(
    ("is_list", "bad"), [(False, bad) for bad in BAD_CALLS] + [(True, bad) for bad in BAD_LISTS], ids=str
)
def test_bad_input_is_refused_before_anything_is_written(is_list, bad):
    name, spoil, kind, words = (BAD_LISTS if is_list else BAD_CALLS)[bad]
    arguments = spoil(*(lists_of_operands(name) if is_list else operands(name, 9, 3, 2, "plain", torch.float32)))
    op = registered(name, is_list=is_list)
    calls = [op]
    if bad == "device":
        # Call the implementation for a CPU, although some tensors are elsewhere.
        calls = [partial(op.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))]
    elif name in (*IN_PLACE, "sketch") or bad == "no problems":
        # An op that overwrites or draws, or gets an empty list, checks its input however it is called.
        calls += [OPS[name], brandla.backend("torch")(OPS[name].__call__)]
    for call in calls:
        with unchanged(arguments[0]), pytest.raises(kind) as caught:
            call(*arguments)
        assert str(caught.value).startswith(f"brandla::{name}: ")
        assert [word for word in words.split(" … ") if word not in str(caught.value)] == []


def test_what_is_no_tensor_is_refused():
    signature = OPS["project"].signature
    basis, columns = operands("project", 9, 3, 2, "plain", torch.float32)
    for check, arguments, words in (
        (signature.sizes, (basis, columns.tolist()), "columns must be a tensor; got list"),
        (signature.sizes, (None, columns), "basis must be a tensor; got NoneType"),
        (signature.grouped_sizes, ([basis], columns), "columns must be a list of tensors; got Tensor"),
        (signature.grouped_sizes, ([basis], [1]), r"columns\[0\] must be a tensor; got int"),
    ):
        with pytest.raises(TypeError, match=f"brandla::project: {words}"):
            check(arguments)


def test_bad_input_is_refused_while_tracing():
    with pytest.raises(ValueError, match=r"brandla::project: columns must have shape"):
        registered("project")(torch.empty(9, 3, device="meta"), torch.empty(8, 2, device="meta"))
