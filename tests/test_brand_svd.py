"""svd_update and svd_append: the best truncation of a sum, and of columns that keep arriving."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_map

import brandla
import oracles
from builders import assert_decomposition, assert_differentiable, dense, make_columns, make_svd
from oracles import THRESHOLD


class Operation(NamedTuple):
    """One of the two functions, called alike: appending takes no notice of what is right."""

    name: str
    appends: bool

    def __call__(self, svd, left, right, **options):
        return getattr(brandla, self.name)(svd, left, *([] if self.appends else [right]), **options)

    def whole(self, svd, left, right, decay=1.0):
        """Return decay·U S Vh + left rightᵀ, or [decay·U S Vh, left], in float64."""
        old = decay * dense(svd)
        return torch.cat([old, left.double()], dim=-1) if self.appends else old + left.double() @ right.double().mT


UPDATE, APPEND = Operation("svd_update", appends=False), Operation("svd_append", appends=True)
BOTH = pytest.mark.parametrize("operation", [UPDATE, APPEND], ids=["svd_update", "svd_append"])


def assert_equals(svd, matrix, dtype, scale=None):
    """Check that nothing of a matrix is lost."""
    assert_decomposition(svd, len(svd.S))
    assert oracles.difference_ratio(dense(svd), matrix, dtype, scale) <= THRESHOLD


def operands(m, n, r, k, dtype=torch.float64, **options):
    """Return a decomposition and new columns on both sides."""
    left, right = (make_columns(size, k, dtype=dtype, seed=seed, **options) for size, seed in ((m, 3), (n, 4)))
    return make_svd(m, n, r, dtype=dtype, **options), left, right


@pytest.mark.parametrize(
    ("m", "n", "r", "k"),
    [
        *((40, 31, 8, 6), (31, 40, 8, 6), (101, 53, 13, 17)),
        *((12, 9, 7, 8), (60, 9, 7, 8), (9, 60, 7, 8), (7, 5, 3, 20)),  # k above both rests, above one, above m and n
        *((9, 9, 9, 4), (11, 13, 4, 0), (11, 13, 0, 3), (11, 13, 0, 0)),  # full rank, nothing new, nothing old, neither
        *((11, 13, 4, 1), (1, 6, 1, 2), (6, 1, 1, 2), (1, 1, 1, 1)),
    ],
    ids=str,
)
@BOTH
def test_every_shape_equals_batch_decomposition_at_full_rank(operation, m, n, r, k, dtype):
    given = operands(m, n, r, k, dtype)
    matrix = operation.whole(*given, 0.5)
    new = operation(*given, decay=0.5, rank=min(m, m if operation.appends else n, r + k))
    assert_equals(new, matrix, dtype)


@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
@pytest.mark.parametrize("rank", [1, 8, 14])
@BOTH
def test_truncation_is_the_best_approximation(operation, spectrum, rank, dtype):
    _, left, right = operands(40, 31, 8, 6, dtype)
    old = make_svd(40, 31, 8, spectrum, dtype=dtype)
    new, matrix = operation(old, left, right, decay=0.9, rank=rank), operation.whole(old, left, right, 0.9)
    truncation, values = oracles.svd_truncation(matrix, rank)
    slack = oracles.tolerance(max(matrix.shape), dtype, values[0])
    assert_decomposition(new, rank)
    assert (new.S - values[:rank]).abs().max() <= slack
    error, best = (oracles.spectral_norm(matrix - approximation) for approximation in (dense(new), truncation))
    assert error <= best + slack


@BOTH
def test_rank_may_be_a_rule_of_singular_values(operation, dtype):
    _, left, right = operands(40, 31, 8, 6, dtype)
    given = make_svd(40, 31, 8, "slow", dtype=dtype), 0.1 * left, 0.1 * right
    new, matrix = operation(*given, rank=brandla.Rank(max=10, tol=0.4)), operation.whole(*given)
    values = torch.linalg.svdvals(matrix)
    wanted = int((values > 0.4 * values[0]).sum())
    truncation, _ = oracles.svd_truncation(matrix, wanted)
    assert new.S.shape == (10,)
    assert int((new.S > 0).sum()) == wanted
    assert not new.U[:, wanted:].any()
    assert oracles.difference_ratio(dense(new), truncation, dtype) <= THRESHOLD


# A stream, k, batches, and the most singular values held: room for all that come, in batches wider than that too.
WHOLE = {
    **{stream: (stream, 5, 8, 40) for stream in oracles.STREAMS},
    "sixteen directions in 32 columns": ("rank-16", 32, 5, 24),
    "four directions in 32 columns": ("repeated-8", 32, 5, 24),
}


@pytest.mark.parametrize("case", WHOLE)
@BOTH
def test_a_stream_that_cuts_nothing_loses_nothing(operation, case, dtype):
    (stream, k, count, most), m, n = WHOLE[case], 64, 50
    lefts, rights = (oracles.batches(stream, size, k, count, seed=size, dtype=dtype) for size in (m, n))
    value = brandla.LowRankSVD.zeros(m, 0 if operation.appends else n, 0, dtype=dtype)
    matrix = dense(value)
    for left, right in zip(lefts, rights, strict=True):
        matrix = torch.cat([matrix, left], 1) if operation.appends else matrix + left.double() @ right.double().mT
        value = operation(value, left, right, rank=min(most, value.rank + k))
    assert_equals(value, matrix, dtype)
    values = torch.linalg.svdvals(matrix)
    assert (value.S - values[: value.rank]).abs().max() <= oracles.tolerance(m, dtype, values[0])


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_columns_inside_the_spans_add_no_direction(side, dtype):
    old, left, right = operands(40, 31, 8, 6, dtype)
    left = old.U @ old.U.mT @ left if side != "right" else left
    right = old.Vh.mT @ old.Vh @ right if side != "left" else right
    assert_equals(brandla.svd_update(old, left, right, rank=14), UPDATE.whole(old, left, right), dtype)


@BOTH
def test_zero_matrix_stays_zero(operation, dtype):
    nothing = tree_map(torch.zeros_like, operands(12, 9, 4, 3, dtype))
    assert_equals(operation(*nothing, rank=7), operation.whole(*nothing), dtype)


# Of vectors of some 20 entries, nearly all of the range of the dtype.
SCALES = {torch.float32: (1e-30, 1e-18, 1e-9, 1e9, 1e18, 1e36), torch.float64: (1e-300, 1e-145, 1e-100, 1e100, 1e300)}


def test_result_scales_with_the_data(dtype):
    for scale in SCALES[dtype]:
        columns, right = make_columns(24, 6, scale=scale, dtype=dtype), make_columns(6, 3, dtype=dtype)
        value = brandla.svd_append(brandla.LowRankSVD.zeros(24, 0, 6, dtype=dtype), columns)
        new = brandla.svd_update(value, columns[:, :3], right)
        for actual, expected in ((value, columns), (new, UPDATE.whole(value, columns[:, :3], right))):
            # In float64 the largest entries times √24 would overflow.
            scaled = actual._replace(S=actual.S.double() / scale)
            assert_equals(scaled, expected.double() / scale, dtype)


LENGTHS = {
    torch.float32: (1e-18, 1e-25, 1e-31, 1e-36, 1e-40, 1e-44),
    torch.float64: (1e-36, 1e-155, 1e-250, 1e-310, 1e-320),
}


@pytest.mark.parametrize("short", ["one", "all"])
def test_columns_too_short_to_be_scaled_count_as_zero_at_worst(short, dtype):
    m, n, k = 40, 31, 5
    # In float32 a column up to tiny / ε, here on either side of the product, and below the normal numbers any column.
    finfo = torch.finfo(dtype)
    vanishes = finfo.tiny / finfo.eps if dtype == torch.float32 else finfo.tiny
    right = make_columns(n, k, dtype=dtype, seed=2)
    old = make_svd(m, n, 4, dtype=dtype) if short == "one" else brandla.LowRankSVD.zeros(m, n, 4, dtype=dtype)
    turned = brandla.LowRankSVD(old.Vh.mT, old.S, old.U.mT)
    for length in LENGTHS[dtype]:
        columns = oracles.gaussian(m, k, seed=1)
        columns[:, 2 if short == "one" else slice(None)] *= length
        columns = columns.to(dtype)
        for operation, given, lost in (
            (APPEND, (old, columns, right), finfo.tiny),
            (UPDATE, (old, columns, right), vanishes),
            (UPDATE, (turned, right, columns), vanishes),
        ):
            new, matrix = operation(*given, rank=9), operation.whole(*given)
            assert_decomposition(new, 9)
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
        old = make_svd(m, n, r, "slow", dtype=dtype)
        assert_equals(brandla.svd_append(old, left, rank=r + k), APPEND.whole(old, left, right), dtype)
        for partners in (right.to(dtype), (right / scales).to(dtype)):
            # Each column is right to its own length, and so each product of a column with its partner.
            lengths = (torch.linalg.vector_norm(side.double(), dim=0) for side in (left, partners))
            scale = float(old.S.sum() + math.prod(lengths).sum())
            new = brandla.svd_update(old, left, partners, rank=r + k)
            assert_equals(new, UPDATE.whole(old, left, partners), dtype, scale)


@BOTH
def test_new_vectors_have_the_sign_of_the_old_ones_in_their_places(operation, dtype):
    old, left, right = operands(40, 31, 8, 4, dtype)
    left = 0.02 * left
    signs = torch.ones(8, dtype=dtype)
    for seed in range(6):
        signs[seed:] *= -1
        old = brandla.LowRankSVD(old.U * signs, old.S, old.Vh * signs[:, None])
        new = operation(old, left, right, rank=12 if seed % 2 else 6)
        both = slice(min(8, new.rank))
        agreement = (new.U[:, both] * old.U[:, both]).sum(0)
        assert (agreement >= -oracles.tolerance(40, dtype)).all()
        of_right = (new.Vh[both, :31] * old.Vh[both]).sum(-1)
        assert (torch.stack([agreement, of_right])[:, :3] > 0.5).all()


@BOTH
def test_sparse_columns_equal_dense_ones(operation, dtype):
    old, left, right = operands(20, 16, 5, 4, dtype)
    left, right = left.relu(), right.relu()
    assert_equals(operation(old, left.to_sparse(), right.to_sparse()), dense(operation(old, left, right)), dtype)


def test_many_updates_do_not_drift():
    m, n, r, k = 30, 24, 8, 3
    value = brandla.LowRankSVD.zeros(m, n, r, dtype=torch.float32)
    lefts, rights = (oracles.batches("medium", size, k, 50, seed=size, dtype=torch.float32) for size in (m, n))
    for step in range(200):
        value = brandla.svd_update(value, lefts[step % 50], rights[step % 50], decay=0.9)
    for side in (value.U, value.Vh.mT):
        assert oracles.orthonormality_defect(side, value.S) <= 200 * torch.finfo(torch.float32).eps


@BOTH
@pytest.mark.parametrize("rank", [8, 5, 3], ids=["whole", "truncated", "lower"])
@pytest.mark.parametrize("k", [3, 18], ids=["usual", "wider than tall"])
def test_derivatives_by_every_tensor(operation, k, rank):
    assert_differentiable(partial(operation, decay=0.9, rank=rank), *operands(20, 16, 5, k))
