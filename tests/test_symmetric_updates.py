"""What every form of the symmetric update promises: eigh_update, and root_update by eigh and by Cholesky."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

import brandla
import oracles
from builders import (
    EIGH_UPDATE,
    ROOT_UPDATE,
    SYMMETRIC_UPDATES,
    SymmetricUpdate,
    assert_differentiable,
    defect,
    dense,
    make_columns,
    tall_of,
    unbound,
    values_of,
)
from oracles import ORTHONORMAL, THRESHOLD


def assert_factor(value: Any, n: int, rank: int) -> None:
    """Check shapes, U or S, and that the values are non-negative and, of an exact form, descending."""
    values, tall = values_of(value), tall_of(value)
    assert values.shape[-1] == rank
    assert tall.shape[-2:] == (n, rank)
    assert defect(value) <= ORTHONORMAL * oracles.epsilon(tall.dtype)
    if isinstance(value, brandla.LowRankEigh):
        assert (values >= 0).all()
        assert (values.diff(dim=-1) <= 0).all()
    else:
        assert torch.equal(value.gram, value.gram.mT)


def assert_underestimates(value: Any, matrix: Tensor, largest: float | None = None, decay: float = 0.0) -> None:
    """Check 0 ⪯ M̂ ⪯ M up to rounding."""
    largest = oracles.spectral_norm(matrix) if largest is None else largest
    slack = oracles.rounding(matrix.shape[-1], tall_of(value).dtype, largest, decay)
    approximation = dense(value)
    assert oracles.eigh(approximation).eigenvalues.amin() >= -slack
    assert oracles.eigh(matrix - approximation).eigenvalues.amin() >= -slack


# ---------------------------------------------------------------------------------------------------------------------
# One update
# ---------------------------------------------------------------------------------------------------------------------


def assert_whole(
    update: SymmetricUpdate, old: Any, columns: Tensor, rank: int, decay: float = 1.0, weight: float = 1.0
) -> None:
    """Check an update that cuts nothing against the dense sum."""
    new, dtype = update(old, columns, decay=decay, weight=weight, rank=rank), tall_of(old).dtype
    assert_factor(new, old.n, rank)
    expected = oracles.updated(dense(old), columns, decay, weight)
    assert oracles.difference_ratio(dense(new), expected, dtype) <= THRESHOLD


@pytest.mark.parametrize(
    ("n", "r", "k"),
    [
        *((12, 7, k) for k in (4, 5, 8)),  # around n − r = 5
        *((7, 3, 20), (30, 3, 300)),  # k above n, and far above
        *((9, 9, 4), (9, 9, 0), (11, 4, 0), (11, 0, 3), (11, 0, 0)),  # nothing left out, nothing new, nothing old
        *((11, 4, 1), (1, 1, 1), (1, 0, 3), (101, 13, 17)),
    ],
    ids=str,
)
def test_every_shape_gives_the_whole_update_at_full_rank(
    update: SymmetricUpdate, n: int, r: int, k: int, dtype: torch.dtype
) -> None:
    old, columns = update.make(n, r, dtype=dtype), make_columns(n, k, dtype=dtype)
    assert_whole(update, old, columns, min(n, r + k), 0.5, 0.3)


def test_zeros_only_decay_and_stay_zero(update: SymmetricUpdate, dtype: torch.dtype) -> None:
    """As columns, as the factor, as ρ and as w."""
    old, columns = update.make(30, 6, dtype=dtype), make_columns(30, 4, dtype=dtype)
    for rank in (6, 10):
        assert_whole(update, old, 0 * columns, rank, decay=0.25)
        assert_whole(update, update.factor.zeros(30, 6, dtype=dtype), 0 * columns, rank)
    assert_whole(update, old, columns, 10, decay=0.0)
    assert_whole(update, old, columns, 10, weight=0.0)


@pytest.mark.parametrize("spectrum", oracles.SPECTRA)
@pytest.mark.parametrize("rank", [0, 1, 8, 9, 14], ids=lambda rank: f"to-{rank}")
def test_truncation_is_the_best_approximation(update: SymmetricUpdate, rank: int, spectrum: str, dtype: torch.dtype):
    n, r, k = 40, 8, 6
    old, columns = update.make(n, r, spectrum, dtype=dtype), make_columns(n, k, dtype=dtype)
    new = update(old, columns, decay=0.9, weight=0.1, rank=rank)
    whole = oracles.updated(dense(old), columns, 0.9, 0.1)
    reference = oracles.eigh(whole)
    values, truncation = reference.eigenvalues, reference.truncation(rank)
    scale, slack = float(values[0]), oracles.tolerance(n, dtype, values[0])
    assert_factor(new, n, rank)
    assert_underestimates(new, whole)
    excess = 1.0 if update.is_exact else 1.25
    assert (whole - dense(new)).trace() <= excess * values[rank:].sum() + n * oracles.rounding(n, dtype, scale)
    if update.is_exact or rank == r + k:
        best = oracles.spectral_norm(whole - truncation)
        assert oracles.spectral_norm(whole - dense(new)) <= best + slack
    if update.is_exact and rank:
        assert (values_of(new) - values[:rank]).abs().max() <= slack
        # A truncation moves under a perturbation by as much as the values that it parts are near (Davis and Kahan).
        gap = float(values[rank - 1] - values[rank]) / scale
        if gap > 1e-2:
            assert oracles.difference_ratio(dense(new), truncation, dtype, scale / gap) <= THRESHOLD


@pytest.mark.parametrize("perturbation", [0.0, 1e-7, 1e-3])
def test_columns_inside_the_span_add_no_direction(update: SymmetricUpdate, perturbation: float, dtype: torch.dtype):
    n, r, k = 64, 12, 8
    old = update.make(n, r, dtype=dtype)
    inside = tall_of(old).double() @ oracles.gaussian(r, k, seed=3)
    columns = (inside + perturbation * oracles.gaussian(n, k, seed=4)).to(dtype)
    new = update(old, columns, rank=r + k)
    assert_factor(new, n, r + k)
    whole = oracles.updated(dense(old), columns)
    assert oracles.spectral_norm(dense(new) - whole) <= 2 * oracles.rounding(n, dtype, oracles.spectral_norm(whole))


P, Z = oracles.gaussian(2, 50, seed=3)
DEPENDENT = {
    "dependent": torch.stack([P, P + 1e-5 * Z, 0.9 * Z], dim=1),
    "weak before strong": torch.stack([1e-6 * (P + 1e-3 * Z), P], dim=1),
}


@pytest.mark.parametrize("start", ["zero", "some"])
@pytest.mark.parametrize("case", DEPENDENT)
def test_nearly_dependent_columns_lose_nothing(update: SymmetricUpdate, case: str, start: str, dtype: torch.dtype):
    n = 50
    old = update.make(n, 4, dtype=dtype) if start == "some" else update.factor.zeros(n, 4, dtype=dtype)
    columns = DEPENDENT[case].to(dtype)
    for rank in (4, 4 + columns.shape[1]):
        new = update(old, columns, rank=rank)
        whole = oracles.updated(dense(old), columns)
        assert_factor(new, n, rank)
        assert_underestimates(new, whole)
        if start == "zero" or rank > 4:
            slack = 2 * oracles.rounding(n, dtype, oracles.spectral_norm(whole))
            assert oracles.spectral_norm(dense(new) - whole) <= slack


@pytest.mark.parametrize("exponent", [-38, -30, -18, -9, 9, 18, 30, 37])
# Weights that undo the lengths, and weights that bring them into range.
@pytest.mark.parametrize("stretch", [2.0, 1.6])
def test_lengths_of_columns_do_not_matter_where_the_result_is_in_range(
    update: SymmetricUpdate, exponent: int, stretch: float
) -> None:
    n, k, weight = 24, 4, 10.0 ** (-stretch * exponent)
    value, matrix = update.factor.zeros(n, 8, dtype=torch.float32), torch.zeros(n, n, dtype=torch.float64)
    for seed in range(4):
        columns = make_columns(n, k, seed=seed, scale=10.0**exponent / n**0.5).float()
        assert columns.isfinite().all()
        rank = min(n, tall_of(value).shape[-1] + k)
        value, matrix = update(value, columns, rank=rank, weight=weight), oracles.updated(matrix, columns, 1.0, weight)
    assert_factor(value, n, n)
    assert oracles.difference_ratio(dense(value), matrix, torch.float32) <= THRESHOLD


def test_a_million_rows_lose_no_digits(update: SymmetricUpdate) -> None:
    n, r, k, eps = 1_000_000, 3, 4, torch.finfo(torch.float32).eps
    lead, source = oracles.gaussian(n, 3, seed=0).float(), oracles.generator(1)
    value = update.factor.zeros(n, r, dtype=torch.float32)
    for _ in range(3):
        columns = lead @ torch.randn(3, k, generator=source) + 0.05 * torch.randn(n, k, generator=source)
        value = update(value, columns, decay=0.9, weight=0.1)
    # A float32 product of these columns is wrong by some thousand ε.
    assert defect(value) <= 20 * eps


# ---------------------------------------------------------------------------------------------------------------------
# Sparse columns, and what is not finite
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["COO", "CSR"])
def test_sparse_columns_are_multiplied_with_and_never_dense(
    update: SymmetricUpdate, layout: torch.layout, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, r, k = 50, 6, 4
    old, columns = brandla.track(update.make(n, r, dtype=dtype)), make_columns(n, k, dtype=dtype)
    columns = columns * (oracles.gaussian(n, k, seed=8) > 1)
    sparse = columns.to_sparse(layout=layout)
    expected, at_old_rank = update(old, columns, decay=0.9, weight=0.3, rank=8), update(old, columns)
    genuine = Tensor.to_dense

    def small(tensor: Tensor) -> Tensor:
        assert tensor.shape == (k, k)
        return genuine(tensor)

    monkeypatch.setattr(Tensor, "to_dense", small)
    found = update(old, sparse, decay=0.9, weight=0.3, rank=8)
    listed = update.grouped([old, old], [sparse, columns], decay=0.9, weight=0.3, rank=8)
    written = update.in_place(tree_map(Tensor.clone, old), sparse)
    columns[[3, 9], [0, 1]] = math.nan
    poisoned = columns.to_sparse(layout=layout)
    with brandla.checked(), pytest.raises(ValueError, match="columns must be finite; got 2 NaN"):
        update(old, poisoned)
    for one, wanted in ((found, expected), (listed[0], expected), (listed[1], expected), (written, at_old_rank)):
        assert oracles.difference_ratio(dense(one.lowrank), dense(wanted.lowrank), dtype) <= THRESHOLD
        torch.testing.assert_close(one[1:], wanted[1:], rtol=1e-4, atol=1e-6)


def test_a_factor_that_is_not_finite_shows_where_sparse_columns_hold_nothing(update: SymmetricUpdate) -> None:
    old = update.make(30, 6)
    tall_of(old)[7, 2] = math.nan
    columns = torch.eye(30, 2, dtype=torch.float64).to_sparse()
    assert not update(old, columns).is_finite()


def test_non_finite_data_stays_poisonous(update: SymmetricUpdate) -> None:
    columns = make_columns(30, 4)
    poisoned = update(update.make(30, 6), columns * math.nan)
    for again in (update(poisoned, columns), update(poisoned, columns[:, :0]), update(poisoned, columns, decay=0.0)):
        assert values_of(again).isnan().all()
        assert tall_of(again).isnan().all()


# ---------------------------------------------------------------------------------------------------------------------
# Many updates
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", oracles.STREAMS)
def test_error_is_what_was_discarded_and_stays_within_its_bound(
    update: SymmetricUpdate, stream: str, dtype: torch.dtype
) -> None:
    n, r, k, decay = 48, 12, 8, 0.9
    tracked = brandla.track(update.factor.zeros(n, r, dtype=dtype))
    matrix = discarded = torch.zeros(n, n, dtype=torch.float64)
    peak = heaviest = 0.0
    for step, columns in enumerate(oracles.batches(stream, n, k, 30, dtype=dtype), start=1):
        target = oracles.updated(dense(tracked.lowrank), columns, decay, 1 - decay)
        tracked = update(tracked, columns, decay=decay, weight=1 - decay)
        discarded = decay * discarded + target - dense(tracked.lowrank)
        matrix = oracles.updated(matrix, columns, decay, 1 - decay)
        peak, heaviest = max(peak, oracles.spectral_norm(matrix)), max(heaviest, float(matrix.trace()))
        if step % 3:
            continue
        error = matrix - dense(tracked.lowrank)
        assert oracles.spectral_norm(error) <= float(tracked.error_bound) + oracles.rounding(n, dtype, peak, decay)
        assert abs(float(tracked.trace) - float(matrix.trace())) <= oracles.rounding(n, dtype, heaviest, decay)
        assert_factor(tracked.lowrank, n, r)
        assert_underestimates(tracked.lowrank, matrix, peak, decay)
    assert oracles.difference_ratio(error, discarded, torch.float64, scale=peak) <= THRESHOLD
    # A useful bound: no larger than the trace, which bounds every norm of a semi-definite remainder.
    assert float(tracked.error_bound) <= float(discarded.trace()) + n * oracles.rounding(n, dtype, peak, decay)


@pytest.mark.parametrize("stream", ["rank-16", "repeated-8"])
def test_batches_wider_than_their_rank_lose_nothing(update: SymmetricUpdate, stream: str, dtype: torch.dtype) -> None:
    # Sixteen directions in batches of 32 columns, or 4 in each of 5 batches: a rank of 24 holds them all.
    n, r, k = 64, 24, 32
    batches = oracles.batches(stream, n, k, 5 if stream == "repeated-8" else 20, dtype=dtype)
    value, matrix = update.factor.zeros(n, r, dtype=dtype), torch.zeros(n, n, dtype=torch.float64)
    for columns in batches:
        value = update(value, columns, decay=0.9, weight=0.1)
        matrix = oracles.updated(matrix, columns, 0.9, 0.1)
        assert_factor(value, n, r)
    assert oracles.difference_ratio(dense(value), matrix, dtype) <= THRESHOLD


def test_tracking_does_not_change_the_factor(update: SymmetricUpdate) -> None:
    plain, columns = update.make(30, 6), make_columns(30, 4)
    tracked = update(brandla.track(plain), columns, decay=0.9)
    assert isinstance(tracked, brandla.Tracked)
    assert all(torch.equal(a, b) for a, b in zip(update(plain, columns, decay=0.9), tracked.lowrank, strict=True))


@pytest.mark.parametrize("stream", oracles.STREAMS)
def test_a_stream_that_cuts_nothing_loses_nothing(update: SymmetricUpdate, stream: str, dtype: torch.dtype) -> None:
    n, k = 48, 8
    tracked = brandla.track(update.factor.zeros(n, 0, dtype=dtype))
    matrix = torch.zeros(n, n, dtype=torch.float64)
    # Once all n directions are held, Cholesky chooses columns, and leaves out some of what is small.
    count = 12 if update.is_exact else n // k
    for step, columns in enumerate(oracles.batches(stream, n, k, count, dtype=dtype), start=1):
        tracked, matrix = update(tracked, columns, rank=min(n, k * step)), oracles.updated(matrix, columns)
    slack = 2 * oracles.rounding(n, dtype, oracles.spectral_norm(matrix))
    assert tracked.error_bound <= slack
    assert oracles.spectral_norm(dense(tracked.lowrank) - matrix) <= slack


@pytest.mark.slow
@pytest.mark.parametrize(("n", "r", "k", "count"), [(64, 12, 8, 200), (24, 6, 2, 1000)], ids=["hundreds", "thousand"])
def test_many_updates_do_not_drift(update: SymmetricUpdate, n: int, r: int, k: int, count: int) -> None:
    """Of all streams at once; their first batches are repeated, so that no time is spent on drawing them."""
    period = 50
    streams = [torch.stack(oracles.batches(name, n, k, period, dtype=torch.float32)) for name in oracles.STREAMS]
    steps = torch.stack(streams, dim=1)
    value = update.factor.zeros(n, r, batch_shape=(len(streams),), dtype=torch.float32)
    for step in range(count):
        value = update(value, steps[step % period], decay=0.95, weight=0.05)
        if step % (count // 10) == count // 10 - 1:
            defects = zip(oracles.STREAMS, map(defect, unbound(value)), strict=True)
            ratios = {name: own / oracles.epsilon(torch.float32) for name, own in defects}
            assert {name: ratio for name, ratio in ratios.items() if not ratio <= ORTHONORMAL} == {}


@st.composite
def steps(draw: st.DrawFn) -> tuple[float, int, float, bool]:
    """Draw (decay, k, scale of the columns, whether a column is repeated)."""
    return (
        draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        draw(st.integers(0, 14)),
        draw(st.sampled_from([0.0, 1e-6, 1.0, 1e4])),
        draw(st.booleans()),
    )


@settings(max_examples=25)
@given(
    sequence=st.lists(steps(), min_size=1, max_size=8),
    rank=st.integers(0, 12),
    is_double=st.booleans(),
    seed=st.integers(0, 10),
)
@pytest.mark.parametrize("update", SYMMETRIC_UPDATES, ids=str)
def test_any_sequence_stays_between_zero_and_the_truth(
    update: SymmetricUpdate, sequence: list[tuple[float, int, float, bool]], rank: int, *, is_double: bool, seed: int
) -> None:
    n, dtype = 12, torch.float64 if is_double else torch.float32
    tracked = brandla.track(update.factor.zeros(n, rank, dtype=dtype))
    matrix, peak = torch.zeros(n, n, dtype=torch.float64), 0.0
    for step, (decay, k, scale, is_repeated) in enumerate(sequence):
        columns = make_columns(n, k, seed=100 * seed + step, scale=scale, dtype=dtype)
        columns = columns[:, :1].expand(n, k) if is_repeated and k else columns
        tracked = update(tracked, columns, decay=decay)
        matrix = oracles.updated(matrix, columns, decay)
        peak = max(decay * peak, oracles.spectral_norm(matrix))
        assert_factor(tracked.lowrank, n, rank)
        # The rounding of so many updates, as 1/(1 − ρ) counts them.
        assert_underestimates(tracked.lowrank, matrix, peak, step / (step + 1))
        error = oracles.spectral_norm(matrix - dense(tracked.lowrank))
        assert error <= float(tracked.error_bound) + oracles.rounding(n, dtype, peak, step / (step + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives where eigenvalues of the core coincide: from zeros, of dependent columns
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [EIGH_UPDATE, ROOT_UPDATE], ids=str)
@pytest.mark.parametrize("rank", [6, 4, 2, None], ids=["more rank than columns", "as much", "less", "a factor"])
def test_derivatives_by_columns_are_right(update: SymmetricUpdate, rank: int | None) -> None:
    start = update.make(9, 3, "slow") if rank is None else update.factor.zeros(9, rank, dtype=torch.float64)
    two = make_columns(9, 2)
    for columns in [torch.cat([two, two], dim=1)] * (rank in (4, None)) + [make_columns(9, 4)] * (rank is not None):
        assert_differentiable(lambda columns: update(start, columns), columns)


def test_a_damped_likelihood_of_a_stream_from_zeros_has_a_derivative() -> None:
    """Through an update, and then through the spectrum of S, which has zeros."""

    def loss(columns: Tensor) -> Any:
        root = brandla.root_update(brandla.LowRankRoot.zeros(9, 6, dtype=torch.float64), columns)
        return brandla.damped_power(root, make_columns(9, 4), 0.3, -0.5), brandla.damped_logdet(root, 0.3)

    assert_differentiable(loss, make_columns(9, 4))
