"""The kernel of sketch: its Ω is that of signs to the bit, and products with it lose nothing of float32 data."""

import pytest
import torch

import oracles
from brandla_kernels import signs, sketch
from op_cases import assert_computes

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# n, width: blocks have 32 rows and 16 to 128 columns, a call of Philox draws 32 rows of 4 columns.
SIZES = [(1, 1), (31, 4), (33, 17), (65, 131)]


@pytest.fixture
def seed(device):
    return torch.tensor([-6148914691236517206], device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sketch_of_the_identity_is_the_test_matrix_of_the_seed_of_now(size, dtype, seed, device):
    n, width = size
    for number in (int(seed), 2):
        seed.fill_(number)
        result = sketch(torch.eye(n, dtype=dtype, device=device), seed, width)
        assert torch.equal(result, signs(seed, n, width, dtype=torch.promote_types(dtype, torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_of_every_dtype(dtype, seed, device):
    """Sums over 100 columns are split."""
    matrix = oracles.gaussian(65, 100, seed=2).to(device, dtype)
    expected = matrix.double() @ signs(seed, 100, 17, dtype=torch.float64)
    assert_computes("sketch", (sketch(matrix, seed, 17),), (matrix, seed, 17), (expected,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_problems_of_a_batch_have_test_matrices_of_their_own(dtype, seed, device):
    identities = torch.eye(40, dtype=dtype, device=device).expand(2, 3, 40, 40)
    result = sketch(identities, seed, 9)
    assert torch.equal(result, signs(seed, 40, 9, batch_shape=(2, 3)))
    assert torch.equal(result[1, 2], sketch(identities[0, 0], seed, 9, 5))


def test_no_bit_of_float32_data_is_lost(seed, device):
    """Integers of 20 bits times a power of two: sums of 16 of them need 24 bits, and every partial sum is exact."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(-(2**20), 2**20, (70, 16), generator=generator).to(device, torch.float32)
    for scale in (1.0, 2.0**-80, 2.0**90):
        matrix = whole * scale
        exact = matrix.double() @ signs(seed, 16, 8, dtype=torch.float64)
        assert torch.equal(sketch(matrix, seed, 8).double(), exact)


@pytest.mark.usefixtures("_overflow_is_meant")
def test_what_is_not_finite_stays_so(seed, device):
    matrix = torch.ones(4, 5, device=device)
    matrix[1, 2], matrix[2, 3], matrix[3, 0] = torch.inf, -torch.inf, torch.nan
    result, test = sketch(matrix, seed, 6), signs(seed, 5, 6)
    torch.testing.assert_close(result, matrix @ test, rtol=0, atol=0, equal_nan=True)
