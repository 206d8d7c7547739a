"""svd_update and svd_append: the best truncation of a sum, and of columns that keep arriving."""

import math
from functools import partial

import pytest
import torch

import brandla
import oracles
from builders import SVD_APPEND, SVD_UPDATE, assert_differentiable, assert_equals, assert_factor, dense, make_columns

BOTH = pytest.mark.parametrize("update", [SVD_UPDATE, SVD_APPEND], ids=str)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_columns_inside_the_spans_add_no_direction(side, dtype):
    old, left, right = SVD_UPDATE.arguments(40, 31, 8, 6, dtype=dtype)
    left = old.U @ old.U.mT @ left if side != "right" else left
    right = old.Vh.mT @ old.Vh @ right if side != "left" else right
    assert_equals(brandla.svd_update(old, left, right, rank=14), SVD_UPDATE.untruncated(old, left, right))


# Nearly the whole range of the dtype for lengths of vectors of some 20 entries.
SCALES = {torch.float32: (1e-30, 1e-18, 1e-9, 1e9, 1e18, 1e36), torch.float64: (1e-300, 1e-145, 1e-100, 1e100, 1e300)}


def test_result_scales_with_the_data(dtype):
    for scale in SCALES[dtype]:
        columns, right = make_columns(24, 6, scale=scale, dtype=dtype), make_columns(6, 3, dtype=dtype)
        value = brandla.svd_append(brandla.LowRankSVD.zeros(24, 0, 6, dtype=dtype), columns)
        new = brandla.svd_update(value, columns[:, :3], right)
        for actual, expected in ((value, columns), (new, SVD_UPDATE.untruncated(value, columns[:, :3], right))):
            # In float64 the largest entries times √24 would overflow.
            scaled = actual._replace(S=actual.S.double() / scale)
            assert_equals(scaled, expected.double() / scale)


LENGTHS = {
    torch.float32: (1e-18, 1e-25, 1e-31, 1e-36, 1e-40, 1e-44),
    torch.float64: (1e-36, 1e-155, 1e-250, 1e-310, 1e-320),
}


@pytest.mark.parametrize("short", ["one", "all"])
def test_columns_too_short_to_be_scaled_count_as_zero_at_worst(short, dtype):
    m, n, k = 40, 31, 5
    # A column vanishes up to tiny / ε on either side of svd_update in float32, and else below the normal numbers.
    finfo = torch.finfo(dtype)
    vanishes = finfo.tiny / finfo.eps if dtype == torch.float32 else finfo.tiny
    right = make_columns(n, k, dtype=dtype, seed=2)
    old = SVD_UPDATE.make(m, n, 4, dtype=dtype) if short == "one" else brandla.LowRankSVD.zeros(m, n, 4, dtype=dtype)
    transposed = brandla.LowRankSVD(old.Vh.mT, old.S, old.U.mT)
    for length in LENGTHS[dtype]:
        columns = oracles.gaussian(m, k, seed=1)
        columns[:, 2 if short == "one" else slice(None)] *= length
        columns = columns.to(dtype)
        for update, given, lost in (
            (SVD_APPEND, (old, columns, right), finfo.tiny),
            (SVD_UPDATE, (old, columns, right), vanishes),
            (SVD_UPDATE, (transposed, right, columns), vanishes),
        ):
            new, matrix = update(*given, rank=9), update.untruncated(*given)
            assert_factor(new, len(matrix), 9)
            slack = oracles.tolerance(m, dtype, oracles.spectral_norm(matrix)) + k * lost * oracles.spectral_norm(right)
            assert oracles.spectral_norm(dense(new) - matrix) <= slack


@pytest.mark.parametrize("spread", [-8.0, 0.0, 8.0])
@pytest.mark.parametrize(
    "family",
    [
        *("nearly repeated", "p, p + 1e-5 z, 0.9 z", "a weak column first"),
        *("two directions and noise near rounding", "two directions"),
    ],
)
def test_nearly_dependent_columns_of_any_length_lose_nothing(family, spread, dtype):
    m, n, k = 60, 50, 30
    scales = 10 ** (spread * torch.linspace(-1, 1, k, dtype=torch.float64))
    left, right = (oracles.panels(m, k)[family] * scales).to(dtype), oracles.gaussian(n, k, seed=8)
    for r in (0, 6):
        old = SVD_UPDATE.make(m, n, r, "slow", dtype=dtype)
        assert_equals(brandla.svd_append(old, left, rank=r + k), SVD_APPEND.untruncated(old, left, right))
        for partners in (right.to(dtype), (right / scales).to(dtype)):
            # The error of a column is relative to its own length, and of a product to the lengths of both columns.
            lengths = (torch.linalg.vector_norm(side.double(), dim=0) for side in (left, partners))
            scale = float(old.S.sum() + math.prod(lengths).sum())
            new = brandla.svd_update(old, left, partners, rank=r + k)
            assert_equals(new, SVD_UPDATE.untruncated(old, left, partners), scale)


@BOTH
def test_sparse_columns_equal_dense_ones(update, dtype):
    old, *data = update.arguments(20, 16, 5, 4, dtype=dtype)
    data = [part.relu() for part in data]
    assert_equals(update(old, *(part.to_sparse() for part in data)), dense(update(old, *data)))


@BOTH
@pytest.mark.parametrize("rank", [8, 5, 3], ids=["whole", "truncated", "lower"])
@pytest.mark.parametrize("k", [3, 18], ids=["usual", "wider than tall"])
def test_derivatives_by_every_tensor(update, k, rank):
    assert_differentiable(partial(update, decay=0.9, rank=rank), *update.arguments(20, 16, 5, k))
