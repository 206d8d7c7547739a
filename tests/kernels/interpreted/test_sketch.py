"""The kernel of sketch: its Ω is that of signs to the bit, and products with it lose nothing of float32 data."""

import pytest
import torch

from brandla_kernels import signs, sketch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# n, width: blocks have 32 rows and 16 to 128 columns, a call of Philox draws 32 rows of 4 columns.
SIZES = [(1, 1), (31, 4), (33, 17), (65, 131)]


@pytest.fixture
def seed(device):
    return torch.tensor([-6148914691236517206], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sketch_of_the_identity_is_the_test_matrix_of_problem_and_seed_of_now(size, dtype, seed, device):
    n, width = size
    for number, problem in ((int(seed), 0), (2, 5)):
        seed.fill_(number)
        result = sketch(torch.eye(n, dtype=dtype, device=device), seed, width, problem)
        expected = signs(seed, n, width, problem=problem, dtype=torch.promote_types(dtype, torch.float32))
        assert torch.equal(result, expected)


def test_no_bit_of_float32_data_is_lost(seed, device):
    """Integers of 20 bits times a power of two: sums of 16 of them need 24 bits, and every partial sum is exact."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(-(2**20), 2**20, (70, 16), generator=generator).to(device, torch.float32)
    for scale in (1.0, 2.0**-80, 2.0**90):
        matrix = whole * scale
        exact = matrix.double() @ signs(seed, 16, 8, dtype=torch.float64)
        assert torch.equal(sketch(matrix, seed, 8).double(), exact)
