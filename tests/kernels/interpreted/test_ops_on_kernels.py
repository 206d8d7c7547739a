"""Each kernel or torch form against the formula of its op in float64, in every layout and around the edges of tiles."""

import importlib
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from brandla_kernels import OPS
from brandla_kernels._grouped import _arguments_of
from builders import unchanged
from op_cases import CASES, LAYOUTS, assert_computes, exact, grouped, op_of, operands, run

FLOAT32, FLOAT64 = torch.float32, torch.float64
# Ops without a formula: files of their own compare them with their torch forms.
CORES = [name for name in OPS if name not in CASES]
TAKE_HALF = ("project", "cross_gram", "gram_ema_", "sketch")
# n, r, k. Tiles have 128 rows, or 64 (float64, or beside a Gram matrix), 16 to 128 columns, and 32 (16) terms of a sum.
SIZES = {
    "no rows": (0, 3, 4),
    "empty basis": (11, 0, 4),
    "no columns": (11, 3, 0),
    "one": (1, 1, 1),
    "blocks less one": (127, 31, 15),
    "blocks and one": (129, 33, 17),
    "half a widest tile and one": (65, 17, 65),
    "several tiles of columns": (5, 129, 130),
}
# The sizes to test in float64 as well; the others do not depend on the dtype.
OF_FLOAT64 = ("one", "half a widest tile and one", "several tiles of columns")
# Problems of one grouped call: of different n, r and k, with no basis, with no columns, and with no rows.
MIXED = [(37, 5, 3), (65, 33, 17), (11, 0, 4), (9, 4, 0), (0, 2, 2)]
# Sizes that let a thread load 16 bytes at once.
ALIGNED = [(64, 16, 32), (32, 32, 16), (96, 48, 80)]


class NoCopies(TorchDispatchMode):
    """Forbid copies of matrices of ``smallest`` elements or more."""

    def __init__(self, smallest):
        super().__init__()
        self.smallest = smallest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_):
            assert args[0].numel() < self.smallest, f"{func} copies {tuple(args[0].shape)}"
        return func(*args, **(kwargs or {}))


def assert_kernel(case, new):
    """Check an op against its formula, that it leaves its inputs alone, and that a kernel copies no large input."""
    arguments, overwrites = new(), op_of(case).endswith("_")
    largest = max(part.shape[-2:].numel() for part in arguments if isinstance(part, Tensor))
    may_copy = overwrites or not is_kernel(case, arguments[0].device)
    with unchanged(arguments[overwrites:]), nullcontext() if may_copy else NoCopies(max(largest, 2)):
        results = run(OPS[op_of(case)], arguments)
    assert_computes(case, results, new())


def is_kernel(case, device):
    return OPS[op_of(case)].implementation(device.type)[0] == "triton"


def problems(case, sizes, layouts, *rest):
    """Return the arguments of problems of these sizes, which take the layouts in turn."""
    return [operands(case, *size, layouts[index % len(layouts)], *rest) for index, size in enumerate(sizes)]


def mapped(change, arguments):
    """Return the arguments with every tensor changed except a seed."""
    return tuple(change(part) if isinstance(part, Tensor) and part.is_floating_point() else part for part in arguments)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, FLOAT32) for size in SIZES] + [(size, FLOAT64) for size in OF_FLOAT64],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("case", CASES)
def test_kernel_computes_the_formula_at_every_size(case, size, dtype, device):
    assert_kernel(case, lambda: operands(case, *SIZES[size], "plain", dtype, device))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("plain", "batched")])
@pytest.mark.parametrize("case", CASES)
def test_kernel_computes_the_formula_in_every_layout(case, layout, device):
    assert_kernel(case, lambda: operands(case, 37, 17, 5, layout, FLOAT32, device))


@pytest.mark.parametrize(
    ("layout", "half"),
    [("plain", torch.float16), ("transposed", torch.bfloat16), ("batched, with gaps", torch.bfloat16)],
)
@pytest.mark.parametrize("case", TAKE_HALF)
def test_kernel_takes_half_precision_data_exactly(case, layout, half, device):
    assert_kernel(case, lambda: operands(case, 65, 17, 33, layout, FLOAT32, device, half))


@pytest.mark.parametrize("case", [*CASES, *CORES])
def test_kernel_takes_a_batch_of_no_problems(case, device):
    one = operands(case, 9, 3, 2, "plain", FLOAT32, device)
    arguments = mapped(lambda part: part.new_zeros(2, 0, *part.shape), one)
    expected = run(OPS[op_of(case)].torch_form, arguments)
    assert [part.shape for part in run(OPS[op_of(case)], arguments)] == [part.shape for part in expected]


@pytest.mark.usefixtures("_overflow_is_meant")
@pytest.mark.parametrize("case", CASES)
def test_non_finite_input_spoils_its_own_problem_and_no_other(case, device):
    op, new = OPS[op_of(case)], partial(operands, case, 9, 3, 2, "batched", FLOAT32, device)
    data = {operand.position for operand in op.signature.operands if operand.kind == "Data"}
    clean = run(op, new())
    spoilt = [(position, torch.inf) for position in data] + [(position, torch.nan) for position in range(len(new()))]
    for position, value in spoilt:
        arguments = new()
        if isinstance(arguments[position], Tensor) and arguments[position].is_floating_point():
            arguments[position][1, 1].view(-1)[-1] = value
            results = run(op, arguments)
            assert not all(part[1, 1].isfinite().all() for part in results)
            for part, expected in zip(results, clean, strict=True):
                part[1, 1] = expected[1, 1]
                torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["project", "rotate", "damped_apply"])
def test_each_matrix_of_a_call_may_have_a_layout_of_its_own(case, device):
    layouts = ["batched, with gaps", "batched", "batched, one for all", "batched, permuted"]

    def new():
        several = [operands(case, 21, 5, 4, layout, FLOAT32, device) for layout in layouts]
        return tuple(several[position % len(layouts)][position] for position in range(len(several[0])))

    assert_kernel(case, new)


# Powers of ten that scale the root and the columns. Squares of 10²⁵ and of 10⁻²⁵ are out of the range of float32.
RANGES = [(0, -25), (0, 25), (25, 0), (25, 25), (-25, -10), (-30, 10), (-36, 36), (15, -36)]


@pytest.mark.usefixtures("_overflow_is_meant")
@pytest.mark.parametrize("powers", RANGES, ids=str)
@pytest.mark.parametrize("reads", [True, False], ids=["read", "not read"])
def test_cross_gram_takes_columns_of_any_length(reads, powers, device, monkeypatch):
    """The batch also has a problem in range, and one whose root is zero; with and without branches on values."""
    monkeypatch.setattr(importlib.import_module("brandla_kernels.cross_gram"), "reads_are_free", lambda tensor: reads)
    parts = operands("cross_gram", 300, 17, 33, "batched", FLOAT64, device)
    root, columns = (part * 10.0**power for part, power in zip(parts, powers, strict=True))
    root[0, 0], root[0, 1], columns[0, 0] = parts[0][0, 0], 0, parts[1][0, 0]
    arguments = root.float(), columns.float()
    for got, wanted in zip(OPS["cross_gram"](*arguments), exact("cross_gram", arguments), strict=True):
        largest = wanted.abs().amax((-2, -1), keepdim=True)
        assert ((got - wanted).abs() <= 300 * torch.finfo(FLOAT32).eps * largest).all()


STRIDES = {
    "gaps, batch transposed": lambda part: (
        torch.nn.functional.pad(part.transpose(0, 1).contiguous().repeat_interleave(3, -1), (0, 1))[..., :-1:3]
    ).transpose(0, 1),
    "by columns, irregular batch": lambda part: torch.cat([part, part[:, :1]], 1).mT.contiguous().mT[:, :-1],
}


@pytest.mark.parametrize("case", [*CORES, "damped_inverse", "damped_inverse, matrix"])
def test_strides_and_batch_of_small_problems_change_no_bit(case, device):
    """The orders are 17 and 26, and blocks have 16 columns."""
    op, arguments = OPS[op_of(case)], operands(case, 41, 9, 17, "batched", FLOAT32, device)
    expected = run(op, arguments)
    for stride in STRIDES.values():
        assert all(map(torch.equal, run(op, mapped(stride, arguments)), expected))
    # LAPACK may take other steps for one matrix than for two.
    one_for_two = mapped(lambda part: part[:1, 1:].expand(1, 2, *part.shape[2:]), arguments)
    for part, own in zip(run(op, one_for_two), expected, strict=True):
        assert torch.equal(part, own[:1, 1:].expand_as(part)) or not is_kernel(case, device)


@pytest.mark.parametrize("case", [*CASES, *CORES])
def test_two_runs_are_equal_to_the_bit(case, device):
    """This includes sums over several programs, whose parts are added in a fixed order."""
    op, rows = OPS[op_of(case)], 70 if device.type == "cpu" else 2000
    single = (operands(case, rows, 17, 5, "plain", FLOAT32, device) for _ in range(2))
    assert all(map(torch.equal, *(run(op, arguments) for arguments in single)))
    if op.signature.lists:
        lists = (grouped(case, problems(case, MIXED, ["plain"], FLOAT32, device)) for _ in range(2))
        for one, other in zip(*(run(op, arguments) for arguments in lists), strict=True):
            assert all(map(torch.equal, one, other))


# --- Lists


# Sizes, layouts, the dtype, and the dtype of data in half precision.
LISTS = {
    "mixed": (MIXED, ["strided", "plain", "embedded"], FLOAT32, None),
    "mixed float64": (MIXED, ["plain"], FLOAT64, None),
    "aligned rows": (ALIGNED, ["plain"], FLOAT32, None),
    "aligned columns": (ALIGNED, ["transposed"], FLOAT32, None),
    "mixed half": (MIXED, ["plain"], FLOAT32, torch.bfloat16),
    "aligned half": (ALIGNED, ["plain"], FLOAT32, torch.float16),
}


@pytest.mark.parametrize(
    ("case", "lists"), [(case, name) for case in CASES for name in LISTS if case in TAKE_HALF or "half" not in name]
)
def test_grouped_kernel_computes_the_formula_of_each_problem(case, lists, device):
    """The op pads its stacks with zeros."""
    sizes, layouts, dtype, half = LISTS[lists]
    op = OPS[op_of(case)]
    arguments, given = (grouped(case, problems(case, sizes, layouts, dtype, device, half)) for _ in range(2))
    with unchanged(arguments[op.name.endswith("_") :]):
        results = run(op, arguments)
    for index, own_sizes in enumerate(op.signature.grouped_sizes(given)):
        own, found = _arguments_of(op.signature, given, index, own_sizes), []
        # Problems of a sketch are counted.
        assert op.signature.index_position is None or own[-1] == index
        for result, part in zip(results, exact(case, own), strict=True):
            whole, corner = result[index].clone(), tuple(map(slice, part.shape))
            found.append(whole[corner].clone())
            assert isinstance(result, Tensor) or whole.shape == part.shape
            whole[corner] = 0
            assert not whole.any()
        assert_computes(case, found, own)


@pytest.mark.parametrize("case", CASES)
def test_a_list_of_one_equals_the_single_op(case, device):
    single = run(OPS[op_of(case)], operands(case, 48, 16, 32, "plain", FLOAT32, device))
    listed = run(OPS[op_of(case)], grouped(case, problems(case, [(48, 16, 32)], ["plain"], FLOAT32, device)))
    for one, other in zip(single, listed, strict=True):
        assert torch.equal(one, other[0])
