"""Offsets into a matrix are 64 bits wide: rows may lie further apart than 2³¹ elements reach."""

import pytest
import torch

from brandla_kernels import OPS
from op_cases import assert_computes, grouped, operands, run

ROWS, RANK, COLUMNS = 5, 3, 2
# The last row starts at 2³¹ elements, or the last column does.
STRIDE = 2**29


@pytest.fixture
def far_apart(tmp_path, device):
    """Return a function that lays the rows (dim 0) or the columns (dim 1) of a matrix STRIDE elements apart.

    Memory on a CPU is that of a file with holes, so only the pages that hold an element take any. It begins 2³¹
    elements before the matrix, where a 32-bit offset that wraps around would read zeros.
    """

    def place(matrix, dim):
        size, before = (ROWS - 1) * STRIDE + matrix.numel(), 0
        if device.type == "cpu":
            before = 2**31
            memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=before + size, dtype=matrix.dtype)
        else:
            memory = torch.zeros(size, dtype=matrix.dtype, device=device)
        placed = memory.as_strided(matrix.shape, [STRIDE, 1] if dim == 0 else [1, STRIDE], before)
        placed.copy_(matrix)
        return placed

    return place


@pytest.mark.parametrize("listed", [False, True], ids=["single", "grouped"])
@pytest.mark.parametrize("case", ["project", "cross_gram", "rotate", "rotate_", "damped_apply"])
def test_rows_may_lie_further_apart_than_32_bits_reach(case, listed, far_apart, device):
    basis, *others = operands(case, ROWS, RANK, COLUMNS, "plain", torch.float32, device)
    expected = run(OPS[case].torch_form, (basis.clone(), *others))
    arguments = (far_apart(basis, 0), *others)
    if listed:
        (result,) = (part[0] for part in run(OPS[case], grouped(case, [arguments]))[:1])
    else:
        result = run(OPS[case], arguments)[0]
    assert_computes(case, (result, *expected[1:]), (basis, *others))


def test_columns_may_lie_further_apart_than_32_bits_reach(far_apart, device):
    basis, columns = operands("project", 3, ROWS, COLUMNS, "plain", torch.float32, device)
    assert_computes("project", run(OPS["project"], (far_apart(basis, 1), columns)), (basis, columns))
