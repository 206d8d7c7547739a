"""svd_update and svd_append: the best truncation of a sum, and of columns that keep arriving."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import brandla
import oracles
from builders import dense, make_columns, make_svd
from oracles import THRESHOLD


def assert_svd(svd: brandla.LowRankSVD, m: int, n: int, rank: int) -> None:
    """Check shapes, orthonormality on both sides, and values that are descending and non-negative."""
    assert svd.U.shape == (m, rank)
    assert svd.S.shape == (rank,)
    assert svd.Vh.shape == (rank, n)
    assert (svd.S >= 0).all()
    assert (svd.S.diff() <= 0).all()
    assert oracles.orthonormality_ratio(svd.U, svd.S) <= THRESHOLD
    assert oracles.orthonormality_ratio(svd.Vh.mT, svd.S) <= THRESHOLD


def summed(svd: brandla.LowRankSVD, left: Tensor, right: Tensor, decay: float = 1.0) -> Tensor:
    """Return decay·U S Vh + left rightᵀ in float64."""
    return decay * dense(svd) + left.double() @ right.double().mT


def appended(svd: brandla.LowRankSVD, columns: Tensor, decay: float = 1.0) -> Tensor:
    """Return [decay·U S Vh, columns] in float64."""
    return torch.cat([decay * dense(svd), columns.double()], dim=-1)


SHAPES = [
    pytest.param(40, 31, 8, 6, id="usual"),
    pytest.param(31, 40, 8, 6, id="wide"),
    pytest.param(12, 9, 7, 8, id="k above both rests"),
    pytest.param(60, 9, 7, 8, id="k above one rest"),
    pytest.param(9, 60, 7, 8, id="k above the other rest"),
    pytest.param(7, 5, 3, 20, id="k above m and n"),
    pytest.param(9, 9, 9, 4, id="full rank"),
    pytest.param(11, 13, 4, 0, id="no columns"),
    pytest.param(11, 13, 0, 3, id="rank 0"),
    pytest.param(11, 13, 0, 0, id="rank 0, no columns"),
    pytest.param(11, 13, 4, 1, id="a single column"),
    pytest.param(1, 6, 1, 2, id="one row"),
    pytest.param(6, 1, 1, 2, id="one column"),
    pytest.param(1, 1, 1, 1, id="order 1"),
    pytest.param(101, 53, 13, 17, id="primes"),
]


@pytest.mark.parametrize(("m", "n", "r", "k"), SHAPES)
def test_update_of_every_shape_equals_batch_decomposition_at_full_rank(
    m: int, n: int, r: int, k: int, dtype: torch.dtype
) -> None:
    old = make_svd(m, n, r, dtype=dtype)
    left, right = make_columns(m, k, dtype=dtype, seed=3), make_columns(n, k, dtype=dtype, seed=4)
    rank = min(m, n, r + k)
    new = brandla.svd_update(old, left, right, decay=0.5, rank=rank)
    assert_svd(new, m, n, rank)
    assert oracles.difference_ratio(dense(new), summed(old, left, right, 0.5), dtype) <= THRESHOLD


@pytest.mark.parametrize(("m", "n", "r", "k"), SHAPES)
def test_append_of_every_shape_equals_batch_decomposition_at_full_rank(
    m: int, n: int, r: int, k: int, dtype: torch.dtype
) -> None:
    old, columns = make_svd(m, n, r, dtype=dtype), make_columns(m, k, dtype=dtype)
    rank = min(m, r + k)
    new = brandla.svd_append(old, columns, decay=0.5, rank=rank)
    assert_svd(new, m, n + k, rank)
    assert oracles.difference_ratio(dense(new), appended(old, columns, 0.5), dtype) <= THRESHOLD


@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
@pytest.mark.parametrize("rank", [1, 8, 14])
@pytest.mark.parametrize("operation", ["svd_update", "svd_append"])
def test_truncation_is_the_best_approximation(operation: str, spectrum: str, rank: int, dtype: torch.dtype) -> None:
    m, n, r, k = 40, 31, 8, 6
    old, left = make_svd(m, n, r, spectrum, dtype=dtype), make_columns(m, k, dtype=dtype, seed=3)
    right = make_columns(n, k, dtype=dtype, seed=4)
    if operation == "svd_update":
        new, matrix = brandla.svd_update(old, left, right, decay=0.9, rank=rank), summed(old, left, right, 0.9)
    else:
        new, matrix = brandla.svd_append(old, left, decay=0.9, rank=rank), appended(old, left, 0.9)
    truncation, values = oracles.svd_truncation(matrix, rank)
    slack = oracles.tolerance(max(matrix.shape), dtype, values[0])
    assert_svd(new, *matrix.shape, rank)
    assert (new.S - values[:rank]).abs().max() <= slack
    error, best = (oracles.spectral_norm(matrix - approximation) for approximation in (dense(new), truncation))
    assert error <= best + slack


@pytest.mark.parametrize("stream", oracles.STREAMS)
def test_appending_batches_equals_the_svd_of_all_columns(stream: str, dtype: torch.dtype) -> None:
    m, k, count = 48, 5, 8
    batches = oracles.batches(stream, m, k, count, dtype=dtype)
    value = brandla.LowRankSVD.zeros(m, 0, 0, dtype=dtype)
    for columns in batches:
        value = brandla.svd_append(value, columns, rank=min(m, value.rank + k))
    matrix = torch.cat(batches, dim=1)
    assert_svd(value, m, k * count, k * count)
    assert oracles.difference_ratio(dense(value), matrix, dtype) <= THRESHOLD
    _, singular_values = oracles.svd_truncation(matrix, 1)
    assert (value.S - singular_values).abs().max() <= oracles.tolerance(m, dtype, singular_values[0])


@pytest.mark.parametrize("stream", ["rank-16", "repeated-8"])
def test_batches_wider_than_their_rank_lose_nothing(stream: str, dtype: torch.dtype) -> None:
    m, r, k = 64, 24, 32
    batches = oracles.batches(stream, m, k, 5, dtype=dtype)
    value = brandla.LowRankSVD.zeros(m, 0, r, dtype=dtype)
    for step, columns in enumerate(batches, start=1):
        value = brandla.svd_append(value, columns)
        assert_svd(value, m, k * step, r)
    assert oracles.difference_ratio(dense(value), torch.cat(batches, dim=1), dtype) <= THRESHOLD


@pytest.mark.parametrize("stream", ["rank-16", "repeated-8"])
def test_updates_wider_than_their_rank_lose_nothing(stream: str, dtype: torch.dtype) -> None:
    m, n, r, k = 64, 50, 24, 32
    value, matrix = brandla.LowRankSVD.zeros(m, n, r, dtype=dtype), torch.zeros(m, n, dtype=torch.float64)
    lefts, rights = (oracles.batches(stream, size, k, 5, seed=size, dtype=dtype) for size in (m, n))
    for left, right in zip(lefts, rights, strict=True):
        matrix = 0.9 * matrix + left.double() @ right.double().mT
        value = brandla.svd_update(value, left, right, decay=0.9)
        assert_svd(value, m, n, r)
    assert oracles.difference_ratio(dense(value), matrix, dtype) <= THRESHOLD


def test_a_stream_may_start_from_nothing_with_room_for_its_rank(dtype: torch.dtype) -> None:
    value = brandla.LowRankSVD.zeros(20, 0, 4, dtype=dtype)
    columns = make_columns(20, 3, dtype=dtype)
    value = brandla.svd_append(value, columns)
    assert_svd(value, 20, 3, 4)
    assert oracles.difference_ratio(dense(value), columns, dtype) <= THRESHOLD


def test_appended_squares_equal_the_symmetric_update(dtype: torch.dtype) -> None:
    svd = brandla.LowRankSVD.zeros(30, 0, 6, dtype=dtype)
    eigh = brandla.LowRankEigh.zeros(30, 6, dtype=dtype)
    for columns in oracles.batches("slow", 30, 4, 6, dtype=dtype):
        svd = brandla.svd_append(svd, columns, decay=0.9)
        eigh = brandla.eigh_update(eigh, columns, decay=0.81)
    gram = dense(svd) @ dense(svd).mT
    assert oracles.difference_ratio(gram, dense(eigh), dtype) <= THRESHOLD


def test_an_update_can_be_taken_back(dtype: torch.dtype) -> None:
    old = make_svd(40, 31, 8, "slow", dtype=dtype)
    left, right = make_columns(40, 6, dtype=dtype, seed=3), make_columns(31, 6, dtype=dtype, seed=4)
    there = brandla.svd_update(old, left, right, rank=14)
    back = brandla.svd_update(there, left, -right, rank=8)
    scale = oracles.spectral_norm(dense(there))
    assert_svd(back, 40, 31, 8)
    assert oracles.difference_ratio(dense(back), dense(old), dtype, scale) <= THRESHOLD


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_columns_inside_the_spans_add_no_direction(side: str, dtype: torch.dtype) -> None:
    old = make_svd(40, 31, 8, dtype=dtype)
    left, right = make_columns(40, 6, dtype=dtype, seed=3), make_columns(31, 6, dtype=dtype, seed=4)
    left = old.U @ old.U.mT @ left if side != "right" else left
    right = old.Vh.mT @ old.Vh @ right if side != "left" else right
    new = brandla.svd_update(old, left, right, rank=14)
    assert_svd(new, 40, 31, 14)
    assert oracles.difference_ratio(dense(new), summed(old, left, right), dtype) <= THRESHOLD


def test_zero_matrix_stays_zero(dtype: torch.dtype) -> None:
    zero = brandla.LowRankSVD.zeros(12, 9, 4, dtype=dtype)
    none = torch.zeros(12, 3, dtype=dtype)
    updated = brandla.svd_update(zero, none, torch.zeros(9, 3, dtype=dtype), rank=7)
    grown = brandla.svd_append(zero, none, rank=7)
    assert_svd(updated, 12, 9, 7)
    assert_svd(grown, 12, 12, 7)
    assert not dense(updated).any()
    assert not dense(grown).any()


# Of vectors of some 20 entries, nearly all of the range of the dtype.
SCALES = {torch.float32: (1e-30, 1e-18, 1e-9, 1e9, 1e18, 1e36), torch.float64: (1e-300, 1e-145, 1e-100, 1e100, 1e300)}


def test_result_scales_with_the_data(dtype: torch.dtype) -> None:
    for scale in SCALES[dtype]:
        columns = make_columns(24, 6, scale=scale, dtype=dtype)
        value = brandla.svd_append(brandla.LowRankSVD.zeros(24, 0, 6, dtype=dtype), columns)
        right = make_columns(6, 3, dtype=dtype)
        new = brandla.svd_update(value, columns[:, :3], right)
        assert_svd(value, 24, 6, 6)
        assert_svd(new, 24, 6, 6)
        for actual, expected in ((value, columns), (new, summed(value, columns[:, :3], right))):
            # In float64 the largest entries times √24 would overflow.
            scaled = dense(actual._replace(S=actual.S.double() / scale))
            assert oracles.difference_ratio(scaled, expected.double() / scale, dtype) <= THRESHOLD


@pytest.mark.parametrize("length", [1e-18, 1e-25, 1e-31, 1e-36, 1e-40, 1e-44, 1e-155, 1e-250, 1e-310, 1e-320])
@pytest.mark.parametrize("short", ["one", "all"])
def test_columns_too_short_to_be_scaled_count_as_zero_at_worst(short: str, length: float, dtype: torch.dtype) -> None:
    m, n, k = 40, 31, 5
    columns, right = oracles.gaussian(m, k, seed=1), make_columns(n, k, dtype=dtype, seed=2)
    columns[:, 2 if short == "one" else slice(None)] *= length
    columns = columns.to(dtype)
    old = make_svd(m, n, 4, dtype=dtype) if short == "one" else brandla.LowRankSVD.zeros(m, n, 4, dtype=dtype)
    turned = brandla.LowRankSVD(old.Vh.mT, old.S, old.U.mT)
    # In float32 a column up to tiny / ε, here on either side of the product, and below the normal numbers any column.
    finfo = torch.finfo(dtype)
    vanishes = finfo.tiny / finfo.eps if dtype == torch.float32 else finfo.tiny
    for new, matrix, lost in (
        (brandla.svd_append(old, columns, rank=9), appended(old, columns), finfo.tiny),
        (brandla.svd_update(old, columns, right, rank=9), summed(old, columns, right), vanishes),
        (brandla.svd_update(turned, right, columns, rank=9), summed(turned, right, columns), vanishes),
    ):
        assert_svd(new, *matrix.shape, 9)
        slack = oracles.tolerance(m, dtype, oracles.spectral_norm(matrix)) + k * lost * oracles.spectral_norm(right)
        assert oracles.spectral_norm(dense(new) - matrix) <= slack


def nearly_dependent(case: str, n: int, k: int) -> Tensor:
    """Return columns in nearly fewer directions than k."""
    z, p = oracles.gaussian(n, k, seed=3), oracles.gaussian(n, 1, seed=4)
    few = oracles.gaussian(n, 2, seed=5) @ oracles.gaussian(2, k, seed=6)
    match case:
        case "one direction":
            return p + 1e-5 * z
        case "one direction and 0.9 of columns":
            return torch.cat([p, p + 1e-5 * z[:, :1], z[:, 2 : k // 2], 0.9 * z[:, : k - k // 2]], dim=1)
        case "a weak column first":
            return torch.cat([1e-7 * p, p + z[:, 1:]], dim=1)
        case "two directions and noise near rounding":
            return few + 1e-13 * z
        case "two directions":
            return few
    raise AssertionError(case)


@pytest.mark.parametrize("spread", [-8.0, 0.0, 8.0])
@pytest.mark.parametrize(
    "case",
    [
        "one direction",
        "one direction and 0.9 of columns",
        "a weak column first",
        "two directions and noise near rounding",
        "two directions",
    ],
)
def test_nearly_dependent_columns_of_any_length_lose_nothing(case: str, spread: float, dtype: torch.dtype) -> None:
    m, n, k = 60, 50, 30
    scales = 10 ** (spread * torch.linspace(-1, 1, k, dtype=torch.float64))
    left = (nearly_dependent(case, m, k) * scales).to(dtype)
    for r in (0, 6):
        old = make_svd(m, n, r, "slow", dtype=dtype)
        grown = brandla.svd_append(old, left, rank=r + k)
        assert_svd(grown, m, n + k, r + k)
        assert oracles.difference_ratio(dense(grown), appended(old, left), dtype) <= THRESHOLD
        for partners in (oracles.gaussian(n, k, seed=8), oracles.gaussian(n, k, seed=8) / scales):
            right = partners.to(dtype)
            new = brandla.svd_update(old, left, right, rank=r + k)
            assert_svd(new, m, n, r + k)
            # Each column is right to its own length, and so each product of a column with its partner.
            lengths = (torch.linalg.vector_norm(side.double(), dim=0) for side in (left, right))
            scale = float(old.S.sum() + math.prod(lengths).sum())
            assert oracles.difference_ratio(dense(new), summed(old, left, right), dtype, scale) <= THRESHOLD


def test_a_thousand_updates_do_not_drift() -> None:
    m, n, r, k = 48, 40, 10, 3
    value = brandla.LowRankSVD.zeros(m, n, r, dtype=torch.float32)
    lefts, rights = (oracles.batches("medium", size, k, 50, seed=size, dtype=torch.float32) for size in (m, n))
    for step in range(1000):
        value = brandla.svd_update(value, lefts[step % 50], rights[step % 50], decay=0.9)
    limit = 200 * torch.finfo(torch.float32).eps
    assert oracles.orthonormality_defect(value.U, value.S) <= limit
    assert oracles.orthonormality_defect(value.Vh.mT, value.S) <= limit


def _update(svd: brandla.LowRankSVD, left: Tensor, right: Tensor, **options: Any) -> brandla.LowRankSVD:
    return brandla.svd_update(svd, left, right, **options)


def _append(svd: brandla.LowRankSVD, left: Tensor, right: Tensor, **options: Any) -> brandla.LowRankSVD:
    return brandla.svd_append(svd, left, **options)


BOTH = pytest.mark.parametrize("operation", [_update, _append], ids=["svd_update", "svd_append"])


@BOTH
@pytest.mark.parametrize("batch_shape", [(3,), (2, 2), (1,)], ids=str)
def test_batch_equals_a_loop(operation: Callable[..., Any], batch_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    old = make_svd(20, 16, 5, dtype=dtype, batch_shape=batch_shape)
    left = make_columns(20, 3, dtype=dtype, batch_shape=batch_shape, seed=3)
    right = make_columns(16, 3, dtype=dtype, batch_shape=batch_shape, seed=4)
    decay = torch.linspace(0.5, 1, math.prod(batch_shape), dtype=dtype).reshape(batch_shape)
    batched = dense(operation(old, left, right, decay=decay, rank=6))
    for index in (
        torch.cartesian_prod(*(torch.arange(size) for size in batch_shape)).reshape(-1, len(batch_shape)).tolist()
    ):
        at = tuple(index)
        alone = operation(
            brandla.LowRankSVD(*(part[at] for part in old)), left[at], right[at], decay=float(decay[at]), rank=6
        )
        assert oracles.difference_ratio(batched[at], dense(alone), dtype) <= THRESHOLD


@BOTH
@pytest.mark.parametrize("k", [4, 0, 20], ids=lambda k: f"k-{k}")
def test_inputs_are_neither_changed_nor_shared(
    operation: Callable[..., Any], k: int, unchanged: Callable[..., Any], shares_memory: Callable[..., bool]
) -> None:
    old, left, right = make_svd(20, 16, 5), make_columns(20, k), make_columns(16, k)
    with unchanged(old, left, right):
        new = operation(old, left, right)
    assert not shares_memory((old, left, right), new)


@BOTH
def test_layout_of_the_arguments_does_not_matter(operation: Callable[..., Any], dtype: torch.dtype) -> None:
    old = make_svd(20, 16, 5, dtype=dtype)
    left, right = make_columns(20, 4, dtype=dtype), make_columns(16, 4, dtype=dtype)
    views = brandla.LowRankSVD(old.U.mT.contiguous().mT, old.S.repeat_interleave(2)[::2], old.Vh.mT.contiguous().mT)
    strided = [part.repeat_interleave(2, dim=-1)[:, ::2] for part in (left, right)]
    expected = dense(operation(old, left, right, rank=8))
    assert oracles.difference_ratio(dense(operation(views, *strided, rank=8)), expected, dtype) <= THRESHOLD


@BOTH
def test_expanded_columns_are_read_as_their_values(operation: Callable[..., Any], dtype: torch.dtype) -> None:
    old = make_svd(20, 16, 5, dtype=dtype)
    left, right = make_columns(20, 1, dtype=dtype), make_columns(16, 1, dtype=dtype)
    expanded = operation(old, left.expand(20, 4), right.expand(16, 4), rank=9)
    repeated = operation(old, left.repeat(1, 4), right.repeat(1, 4), rank=9)
    assert oracles.difference_ratio(dense(expanded), dense(repeated), dtype) <= THRESHOLD


@BOTH
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_columns_equal_their_float32_values(operation: Callable[..., Any], half: torch.dtype) -> None:
    old = make_svd(20, 16, 5, dtype=torch.float32)
    left, right = make_columns(20, 4).to(half), make_columns(16, 4).to(half)
    from_half, from_float = operation(old, left, right), operation(old, left.float(), right.float())
    assert {part.dtype for part in from_half} == {torch.float32}
    assert oracles.difference_ratio(dense(from_half), dense(from_float), torch.float32) <= THRESHOLD


# Appending rotates the old right vectors and never looks at them, so they are not in its list.
@pytest.mark.parametrize(
    ("operation", "where"),
    [(_update, part) for part in ("left", "right", "U", "S", "Vh")] + [(_append, part) for part in ("left", "U", "S")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_non_finite_data_makes_all_values_nan(operation: Callable[..., Any], where: str, bad: float) -> None:
    old, left, right = make_svd(20, 16, 5), make_columns(20, 4), make_columns(16, 4)
    {"left": left, "right": right, "U": old.U, "S": old.S, "Vh": old.Vh}[where][0] = bad
    new = operation(old, left, right)
    assert new.S.isnan().all()
    assert not new.is_finite()


@BOTH
def test_non_finite_data_poisons_only_its_own_batch_entry(operation: Callable[..., Any]) -> None:
    old = make_svd(20, 16, 5, batch_shape=(2,))
    left, right = (make_columns(size, 4, batch_shape=(2,)) for size in (20, 16))
    left[1, 0, 0] = math.nan
    new = operation(old, left, right)
    assert new.is_finite().tolist() == [True, False]
    assert dense(new)[0].isfinite().all()


def product_with(operation: Callable[..., Any], weights: Tensor, rank: int | None) -> Callable[..., Tensor]:
    """Return ⟨W, result⟩ as a function of U, S, Vh, left and right."""

    def scalar(u: Tensor, s: Tensor, vh: Tensor, left: Tensor, right: Tensor) -> Tensor:
        new = operation(brandla.LowRankSVD(u, s, vh), left, right, decay=0.9, rank=rank)
        return (new.dense() * weights[:, : new.Vh.shape[-1]]).sum()

    return scalar


@BOTH
@pytest.mark.parametrize("rank", [8, 5, 3], ids=["whole", "truncated", "lower"])
@pytest.mark.parametrize("k", [3, 18], ids=["usual", "wider than tall"])
def test_gradient_is_that_of_finite_differences(operation: Callable[..., Any], k: int, rank: int) -> None:
    old, weights = make_svd(20, 16, 5), oracles.gaussian(20, 34, seed=3)
    inputs = [part.requires_grad_() for part in (*old, make_columns(20, k), make_columns(16, k, seed=4))]
    inputs = inputs if operation is _update else [*inputs[:4], inputs[4].detach()]
    torch.autograd.gradcheck(product_with(operation, weights, rank), inputs, fast_mode=True)


@BOTH
def test_gradient_of_a_result_with_nothing_truncated_is_that_of_the_sum(
    operation: Callable[..., Any], dtype: torch.dtype
) -> None:
    m, n, r, k = 40, 31, 5, 3
    left, right = make_columns(m, k, seed=3, dtype=dtype), make_columns(n, k, seed=4, dtype=dtype)
    inputs = [part.requires_grad_() for part in (*make_svd(m, n, r, dtype=dtype), left, right)]
    weights = oracles.gaussian(m, n + k, seed=5).to(dtype)
    found = torch.autograd.grad(product_with(operation, weights, r + k)(*inputs), inputs, materialize_grads=True)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    make = summed if operation is _update else lambda old, left, right, decay: appended(old, left, decay)
    matrix = make(brandla.LowRankSVD(*exact[:3]), *exact[3:], 0.9)
    expected = torch.autograd.grad((matrix * weights[:, : matrix.shape[1]]).sum(), exact, materialize_grads=True)
    scale = oracles.spectral_norm(weights)
    for one, other in zip(found, expected, strict=True):
        assert oracles.difference_ratio(*torch.atleast_2d(one, other), dtype, scale) <= THRESHOLD
