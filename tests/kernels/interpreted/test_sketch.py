"""The kernel of sketch: its Ω is that of signs to the bit, and products with it lose nothing of float32 data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracles
from brandla_kernels import signs, sketch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# n, width: blocks have 32 rows and 16 to 128 columns, a call of Philox draws 32 rows of 4 columns.
SIZES = [(1, 1), (31, 4), (33, 17), (97, 131)]


@pytest.fixture
def seed(device: torch.device) -> Tensor:
    return torch.tensor(-6148914691236517206, device=device)


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return oracles.gaussian(*shape, seed=2).to(device, dtype)


def assert_product(result: Tensor, matrix: Tensor, test: Tensor) -> None:
    """Check Y entry by entry: a sum of n exact terms in any order is within n·ε of them, relative to Σ |x|."""
    tolerance = (matrix.shape[-1] + 1) * torch.finfo(result.dtype).eps
    terms = matrix.double().abs().sum(-1, keepdim=True)
    assert result.dtype == torch.promote_types(matrix.dtype, torch.float32)
    assert ((result.double() - matrix.double() @ test).abs() <= tolerance * terms).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sketch_of_the_identity_is_the_test_matrix(
    size: tuple[int, int], dtype: torch.dtype, seed: Tensor, device: torch.device
) -> None:
    n, width = size
    result = sketch(torch.eye(n, dtype=dtype, device=device), seed, width)
    assert torch.equal(result, signs(seed, n, width, dtype=result.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_of_every_dtype(dtype: torch.dtype, seed: Tensor, device: torch.device) -> None:
    """Sums over 300 columns are split."""
    matrix = normal(65, 300, dtype=dtype, device=device)
    assert_product(sketch(matrix, seed, 17), matrix, signs(seed, 300, 17, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_problems_of_a_batch_have_test_matrices_of_their_own(
    dtype: torch.dtype, seed: Tensor, device: torch.device
) -> None:
    identities = torch.eye(40, dtype=dtype, device=device).expand(2, 3, 40, 40)
    result = sketch(identities, seed, 9)
    assert torch.equal(result, signs(seed, 40, 9, batch_shape=(2, 3)))
    assert torch.equal(result[1, 2], sketch(identities[0, 0], seed, 9, 5))


def test_no_bit_of_float32_data_is_lost(seed: Tensor, device: torch.device) -> None:
    """Integers of 20 bits times a power of two: sums of 16 of them need 24 bits, and every partial sum is exact."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(-(2**20), 2**20, (70, 16), generator=generator).to(device, torch.float32)
    for scale in (1.0, 2.0**-80, 2.0**90):
        matrix = whole * scale
        exact = matrix.double() @ signs(seed, 16, 8, dtype=torch.float64)
        assert torch.equal(sketch(matrix, seed, 8).double(), exact)


@pytest.mark.usefixtures("_overflow_is_meant")
def test_what_is_not_finite_stays_so(seed: Tensor, device: torch.device) -> None:
    matrix = torch.ones(4, 5, device=device)
    matrix[1, 2], matrix[2, 3], matrix[3, 0] = torch.inf, -torch.inf, torch.nan
    result, test = sketch(matrix, seed, 6), signs(seed, 5, 6)
    torch.testing.assert_close(result, matrix @ test, rtol=0, atol=0, equal_nan=True)


def test_seed_is_read_at_every_call(device: torch.device) -> None:
    seed, identity = torch.tensor([1], device=device), torch.eye(50, device=device)
    first = sketch(identity, seed, 20)
    seed.fill_(2)
    second = sketch(identity, seed, 20)
    assert torch.equal(first, signs(torch.tensor(1, device=device), 50, 20))
    assert torch.equal(second, signs(torch.tensor(2, device=device), 50, 20))


def test_gradient_is_the_product_with_the_transposed_test_matrix(seed: Tensor, device: torch.device) -> None:
    matrix = normal(7, 40, dtype=torch.float64, device=device).requires_grad_()
    weights = normal(7, 5, dtype=torch.float64, device=device)
    (sketch(matrix, seed, 5) * weights).sum().backward()
    torch.testing.assert_close(matrix.grad, weights @ signs(seed, 40, 5, dtype=torch.float64).mT)
