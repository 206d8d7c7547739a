"""The promises of one update in each form: eigh_update, root_update by eigh and by Cholesky, svd_update, svd_append."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import brandla
import oracles
from builders import (
    EIGH_UPDATE,
    ROOT_UPDATE,
    SHRINKING,
    SYMMETRIC_UPDATES,
    UPDATES,
    assert_differentiable,
    assert_equals,
    assert_factor,
    assert_same,
    assert_underestimates,
    dense,
    make_columns,
    sides_of,
    tall_of,
    unchanged,
    values_of,
)
from oracles import THRESHOLD

# Updates of a symmetric matrix of order m ignore n.
EVERY = pytest.mark.parametrize("update", UPDATES, ids=str)


@EVERY
@pytest.mark.parametrize(
    ("m", "n", "r", "k"),
    [
        *((12, 9, 7, k) for k in (4, 5, 8)),  # k around m − r = 5, and above both m − r and n − r
        *((60, 9, 7, 8), (9, 60, 7, 8), (7, 5, 3, 20), (30, 31, 3, 300)),  # k above n − r or m − r, above m, far above
        *((9, 9, 9, 4), (9, 9, 9, 0), (11, 13, 4, 0), (11, 13, 0, 3), (11, 13, 0, 0)),  # full rank, k = 0, r = 0
        *((11, 13, 4, 1), (1, 6, 1, 2), (6, 1, 1, 2), (1, 1, 1, 1), (1, 1, 0, 3), (31, 40, 8, 6), (101, 53, 13, 17)),
    ],
    ids=str,
)
def test_every_shape_gives_the_whole_update_at_full_rank(update, m, n, r, k, dtype):
    given = update.arguments(m, n, r, k, dtype=dtype)
    for decay, weight in ((0.5, 0.3), (0.0, 1.0), (1.0, 0.0)):
        whole = update.untruncated(*given, decay=decay, weight=weight)
        assert_equals(update(*given, decay=decay, weight=weight, rank=min(*whole.shape, r + k)), whole)


@EVERY
@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
@pytest.mark.parametrize("rank", [0, 1, 8, 9, 14], ids=lambda rank: f"to-{rank}")
def test_truncation_is_the_best_approximation(update, rank, spectrum, dtype):
    m, r, k, numbers = 40, 8, 6, {"decay": 0.9, "weight": 0.1}
    given = update.arguments(m, 31, r, k, spectrum, dtype=dtype)
    new, whole = update(*given, **numbers, rank=rank), update.untruncated(*given, **numbers)
    truncation, values = oracles.svd_truncation(whole, rank)
    scale, slack = float(values[0]), oracles.tolerance(m, dtype, values[0])
    assert_factor(new, m, rank)
    if update.is_exact or rank == r + k:
        best = oracles.spectral_norm(whole - truncation)
        assert oracles.spectral_norm(whole - dense(new)) <= best + slack
    if update.is_exact and rank:
        assert (values_of(new) - values[:rank]).abs().max() <= slack
        # The smaller the gap between kept and cut values, the further rounding moves a truncation (Davis and Kahan).
        gap = float(values[rank - 1] - values[rank]) / scale
        if gap > 1e-2:
            assert oracles.difference_ratio(dense(new), truncation, dtype, scale / gap) <= THRESHOLD
    if update.is_symmetric:
        assert_underestimates(new, whole)
        excess = 1.0 if update.is_exact else 1.25
        assert (whole - dense(new)).trace() <= excess * values[rank:].sum() + m * oracles.rounding(m, dtype, scale)


P, Z = oracles.gaussian(2, 50, seed=3)
# Columns that add no new direction to F or U, or hardly one.
DEPENDENT = {
    **{
        f"inside the span but for {part:g}": lambda tall, part=part: (
            tall @ oracles.gaussian(4, 8, seed=3) + part * oracles.gaussian(50, 8, seed=4)
        )
        for part in (0.0, 1e-7, 1e-3)
    },
    "dependent": lambda tall: torch.stack([P, P + 1e-5 * Z, 0.9 * Z], dim=1),
    "weak before strong": lambda tall: torch.stack([1e-6 * (P + 1e-3 * Z), P], dim=1),
}


@pytest.mark.parametrize("start", ["zero", "some"])
@pytest.mark.parametrize("case", DEPENDENT)
def test_nearly_dependent_columns_lose_nothing(update, case, start, dtype):
    n, some = 50, update.make(50, 4, dtype=dtype)
    old = some if start == "some" else update.factor.zeros(n, 4, dtype=dtype)
    columns = DEPENDENT[case](tall_of(some).double()).to(dtype)
    whole = oracles.updated(dense(old), columns)
    for rank in (4, 4 + columns.shape[1]):
        new = update(old, columns, rank=rank)
        assert_factor(new, n, rank)
        assert_underestimates(new, whole)
        if rank > 4 or (start == "zero" and columns.shape[1] <= 4):
            slack = 2 * oracles.rounding(n, dtype, oracles.spectral_norm(whole))
            assert oracles.spectral_norm(dense(new) - whole) <= slack


@pytest.mark.parametrize("exponent", [-38, -30, -18, -9, 9, 18, 30, 37])
# Weights that undo the lengths, and weights that bring the lengths into range.
@pytest.mark.parametrize("stretch", [2.0, 1.6])
def test_lengths_of_columns_do_not_matter_if_the_result_is_in_range(update, exponent, stretch):
    n, k, weight = 24, 4, 10.0 ** (-stretch * exponent)
    value, matrix = update.factor.zeros(n, 8, dtype=torch.float32), torch.zeros(n, n, dtype=torch.float64)
    for seed in range(4):
        columns = make_columns(n, k, seed=seed, scale=10.0**exponent / n**0.5).float()
        assert columns.isfinite().all()
        rank = min(n, tall_of(value).shape[-1] + k)
        value, matrix = update(value, columns, rank=rank, weight=weight), oracles.updated(matrix, columns, 1.0, weight)
    assert_equals(value, matrix)


@pytest.mark.parametrize("name", ["eigh_update", "eigh_downdate", "svd_update", "svd_append"])
def test_new_vectors_keep_the_signs_of_the_old_vectors(name, dtype):
    update = {str(update): update for update in UPDATES}.get(name)
    old, *data = (update or EIGH_UPDATE).arguments(40, 31, 8, 4, dtype=dtype, scale=0.02)
    signs = torch.ones(8, dtype=dtype)
    for seed in range(8):
        # Old vectors get both signs, so that LAPACK disagrees with one of them.
        signs[seed:] *= -1
        turned = {part: getattr(old, part) * signs for part in ("eigenvectors", "U") if hasattr(old, part)}
        old = old._replace(**turned | ({"Vh": old.Vh * signs[:, None]} if "U" in turned else {}))
        for rank in (6, 8, 12):
            new = update(old, *data, rank=rank) if update else brandla.eigh_downdate(old, *data, weight=0.1)
            both = min(8, new.rank)
            pairs = zip(sides_of(new), sides_of(old), strict=True)
            agreements = [(side[: len(before), :both] * before[:, :both]).sum(0) for side, before in pairs]
            assert (agreements[0] >= -oracles.tolerance(40, dtype)).all()
            assert all((agreement[:3] > 0.9).all() for agreement in agreements)


# --- Rank(max, tol): a rank that adapts to the spectrum within fixed shapes


def kept(value):
    """Return the number of nonzero columns."""
    return int(tall_of(value).any(-2).sum())


@EVERY
@pytest.mark.parametrize("tol", [0.0, 1e-2, 0.3])
def test_values_under_the_tolerance_vanish_with_their_vectors(update, tol, dtype):
    n, most = 50, 12
    old, *data = update.arguments(n, 41, most, 8, dtype=dtype, scale=0.1)
    new, matrix = update(old, *data, rank=brandla.Rank(max=most, tol=tol)), update.untruncated(old, *data)
    _, values = oracles.svd_truncation(matrix, most)
    slack, largest = oracles.tolerance(n, dtype, values[0]), float(values[0])
    assert_factor(new, n, most)
    # The diagonal of S is only near its eigenvalues, so the Cholesky form may keep one value fewer or more.
    wanted = min(most, int((values > tol * largest).sum()))
    assert abs(kept(new) - wanted) <= (not update.is_exact)
    assert int((values_of(new) > 0).sum()) == kept(new)
    error = oracles.spectral_norm(matrix - dense(new))
    assert error <= 1.5 * max(tol * largest, float(values[most])) + slack
    if update.is_symmetric:
        assert oracles.eigh(matrix - dense(new)).eigenvalues[-1] >= -slack
        tracked = update(brandla.track(old), *data, rank=brandla.Rank(most, tol))
        assert_same(tracked.lowrank, new)
        assert error <= float(tracked.error_bound) + slack
    # A rule with tolerance 0 is the number.
    by_number = update(old, *data, rank=most)
    assert tol or all(torch.equal(a, b) for a, b in zip(new, by_number, strict=True))


def test_tolerance_holds_without_new_columns(update, dtype):
    values = torch.tensor([1.0, 0.5, 1e-3], dtype=dtype)
    old = brandla.LowRankEigh(values, oracles.orthonormal(20, 3, 1).to(dtype))
    old = old if (update.factor is brandla.LowRankEigh) else brandla.LowRankRoot.from_eigh(old)
    new = update(brandla.track(old), make_columns(20, 0, dtype=dtype), rank=brandla.Rank(max=3, tol=0.1))
    assert kept(new.lowrank) == 2
    # The value left out is 1e-3, up to the rounding of d₁ = 1.
    assert abs(float(new.error_bound) - 1e-3) <= oracles.tolerance(20, dtype, 1.0)


def test_later_data_fills_zero_columns(update, dtype):
    n, rule = 50, brandla.Rank(max=12, tol=1e-2)
    value = update.factor.zeros(n, 12, dtype=dtype)
    column = make_columns(n, 1, dtype=dtype)
    for _ in range(3):
        value = update(value, column, decay=0.5, rank=rule)
    assert kept(value) == 1
    for columns in oracles.batches("flat", n, 8, 30, dtype=dtype):
        value = update(value, columns, decay=0.9, weight=0.1, rank=rule)
    assert kept(value) == 12
    assert_factor(value, n, 12)


# --- Sparse columns and non-finite data


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["COO", "CSR"])
def test_sparse_columns_stay_sparse(update, layout, dtype, monkeypatch):
    n, r, k = 50, 6, 4
    old, columns = brandla.track(update.make(n, r, dtype=dtype)), make_columns(n, k, dtype=dtype)
    columns = columns * (oracles.gaussian(n, k, seed=8) > 1)
    sparse = columns.to_sparse(layout=layout)
    expected, at_old_rank = update(old, columns, decay=0.9, weight=0.3, rank=8), update(old, columns)
    genuine = Tensor.to_dense

    def small_to_dense(tensor):
        assert tensor.shape == (k, k)
        return genuine(tensor)

    monkeypatch.setattr(Tensor, "to_dense", small_to_dense)
    single = update(old, sparse, decay=0.9, weight=0.3, rank=8)
    listed = update.grouped([old, old], [sparse, columns], decay=0.9, weight=0.3, rank=8)
    written = update.in_place(tree_map(Tensor.clone, old), sparse)
    columns[[3, 9], [0, 1]] = math.nan
    poisoned = columns.to_sparse(layout=layout)
    with brandla.checked(), pytest.raises(ValueError, match="columns must be finite; got 2 NaN"):
        update(old, poisoned)
    for result, wanted in ((single, expected), (listed[0], expected), (listed[1], expected), (written, at_old_rank)):
        assert oracles.difference_ratio(dense(result.lowrank), dense(wanted.lowrank), dtype) <= THRESHOLD
        torch.testing.assert_close(result[1:], wanted[1:], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")
def test_a_non_finite_factor_shows_if_sparse_columns_miss_its_row(update):
    old = update.make(30, 6)
    tall_of(old)[7, 2] = math.nan
    assert not update(old, torch.eye(30, 2, dtype=torch.float64).to_sparse()).is_finite()


def test_a_non_finite_factor_stays_non_finite(update):
    columns = make_columns(30, 4)
    poisoned = update(update.make(30, 6), columns * math.nan)
    for later in (update(poisoned, columns), update(poisoned, columns[:, :0]), update(poisoned, columns, decay=0.0)):
        assert values_of(later).isnan().all()
        assert tall_of(later).isnan().all()


# --- In place: the same results, written over the tensors of the factor


@pytest.mark.parametrize("update", [*SYMMETRIC_UPDATES, SHRINKING], ids=str)
@pytest.mark.parametrize("k", [0, 8, 60], ids=lambda k: f"k-{k}")
@pytest.mark.parametrize(
    ("batch_shape", "is_tracked"), [((), False), ((), True), ((2,), True)], ids=["plain", "tracked", "batch"]
)
def test_in_place_form_equals_the_plain_form_and_keeps_its_tensors(update, k, batch_shape, is_tracked, dtype):
    old = update.make(64, 12, dtype=dtype, batch_shape=batch_shape)
    value = brandla.track(old) if is_tracked else old
    columns = make_columns(64, k, dtype=dtype, batch_shape=batch_shape)
    expected = update(value, columns, decay=0.9, weight=0.1)
    pointers = [part.data_ptr() for part in tree_leaves(value)]
    with unchanged(columns):
        result = update.in_place(value, columns, decay=0.9, weight=0.1)
    assert result is value
    assert [part.data_ptr() for part in tree_leaves(value)] == pointers
    # `old` shares the tensors of `value`, so it holds the result too.
    actual_dense, expected_dense = dense(old), dense(expected.lowrank if is_tracked else expected)
    pairs = zip(actual_dense.reshape(-1, 64, 64), expected_dense.reshape(-1, 64, 64), strict=True)
    assert all(oracles.difference_ratio(actual, wanted, dtype) <= THRESHOLD for actual, wanted in pairs)
    if is_tracked:
        torch.testing.assert_close(value[1:], expected[1:])


def test_in_place_form_takes_a_tolerance(update):
    value, columns = update.make(64, 12), make_columns(64, 8, scale=0.1)
    expected = update(value, columns, rank=brandla.Rank(max=12, tol=0.05))
    update.in_place(value, columns, tol=0.05)
    assert_equals(value, dense(expected))
    nothing = update.make(64, 0)
    for new in (columns, columns[:, :0]):
        assert update.in_place(nothing, new, tol=0.1) is nothing
        assert not dense(nothing).any()


@pytest.mark.parametrize(
    "spoilt", range(7), ids=["first part", "second part", "error_bound", "trace", "columns", "decay", "weight"]
)
def test_shared_memory_and_gradients_are_refused_before_anything_is_overwritten(update, spoilt):
    value, numbers = brandla.track(update.make(64, 12, batch_shape=(2,))), torch.tensor([0.9, 0.1])
    parts, tree = tree_flatten((value, make_columns(64, 8, batch_shape=(2,)), *numbers.unbind()))

    def written(parts):
        value, columns, decay, weight = tree_unflatten(parts, tree)
        return update.in_place(value, columns, decay=decay, weight=weight)

    if spoilt < 4:
        shared = [part[:1].expand_as(part) if place == spoilt else part for place, part in enumerate(parts)]
        with unchanged(shared), pytest.raises(ValueError, match=rf"^{update.name}_: .*share memory; got .*s \(0, ?"):
            written(shared)
    parts[spoilt] = parts[spoilt].clone().requires_grad_()
    with unchanged(parts), pytest.raises(RuntimeError, match=f"^{update.name}_: .* must not require grad"):
        written(parts)
    assert all(part.grad_fn is None for part in parts)
    with torch.no_grad():
        written(parts)


# --- Derivatives if eigenvalues of the core coincide: from zeros, by dependent columns


@pytest.mark.parametrize("update", [EIGH_UPDATE, ROOT_UPDATE], ids=str)
@pytest.mark.parametrize("rank", [6, 4, 2, None], ids=["more rank than columns", "as much", "less", "a factor"])
def test_derivatives_by_columns_are_correct(update, rank):
    start = update.make(9, 3, "slow") if rank is None else update.factor.zeros(9, rank, dtype=torch.float64)
    two = make_columns(9, 2)
    for columns in [torch.cat([two, two], dim=1)] * (rank in (4, None)) + [make_columns(9, 4)] * (rank is not None):
        assert_differentiable(lambda columns: update(start, columns), columns)


def test_a_damped_likelihood_of_a_stream_from_zeros_has_a_derivative():
    """The derivative passes an update, and then the spectrum of S, which has zeros."""

    def loss(columns):
        root = brandla.root_update(brandla.LowRankRoot.zeros(9, 6, dtype=torch.float64), columns)
        return brandla.damped_power(root, make_columns(9, 4), 0.3, -0.5), brandla.damped_logdet(root, 0.3)

    assert_differentiable(loss, make_columns(9, 4))
