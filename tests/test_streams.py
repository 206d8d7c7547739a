"""Streams of updates, compared with exact truncated updates in float64: what they hold and lose, and their bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import brandla
import oracles
from builders import (
    EIGH_UPDATE,
    ROOT_UPDATE,
    SHRINKING,
    SVD_UPDATE,
    SYMMETRIC_UPDATES,
    UPDATES,
    assert_equals,
    assert_factor,
    assert_underestimates,
    defect,
    dense,
    make_columns,
    members,
    values_of,
)
from oracles import ORTHONORMAL

# In a flat stream, and one whose subspace is replaced, values at the cut are so close that rounding chooses between
# them: a test can only compare how much is cut, not what.
WITH_A_GAP = [stream for stream in oracles.STREAMS if stream not in ("flat", "switch")]


@pytest.mark.parametrize("update", [*SYMMETRIC_UPDATES, SHRINKING], ids=str)
@pytest.mark.parametrize("stream", oracles.STREAMS)
def test_error_is_the_discarded_part_and_stays_within_its_bounds(update, stream, dtype):
    n, r, k, decay = 48, 12, 8, 0.9
    tracked = brandla.track(update.factor.zeros(n, r, dtype=dtype))
    matrix = discarded = truncated = torch.zeros(n, n, dtype=torch.float64)
    peak = heaviest = 0.0
    for step, columns in enumerate(oracles.batches(stream, n, k, 30, dtype=dtype), start=1):
        target = oracles.updated(dense(tracked.lowrank), columns, decay, 1 - decay)
        tracked = update(tracked, columns, decay=decay, weight=1 - decay)
        held = tracked.lowrank
        discarded = decay * discarded + target - dense(held)
        matrix = oracles.updated(matrix, columns, decay, 1 - decay)
        truncated = oracles.eigh(oracles.updated(truncated, columns, decay, 1 - decay)).truncation(r)
        peak, heaviest = max(peak, oracles.spectral_norm(matrix)), max(heaviest, float(matrix.trace()))
        if step % 3:
            continue
        error, slack = matrix - dense(held), oracles.rounding(n, dtype, peak, decay)
        assert oracles.spectral_norm(error) <= float(tracked.error_bound) + slack
        assert abs(float(tracked.trace) - float(matrix.trace())) <= oracles.rounding(n, dtype, heaviest, decay)
        assert_factor(held, n, r)
        assert_underestimates(held, matrix, peak, decay)
    assert oracles.difference_ratio(error, discarded, torch.float64, scale=peak) <= oracles.THRESHOLD
    # A useful bound: no larger than the trace, which bounds every norm of a semi-definite remainder.
    assert float(tracked.error_bound) <= float(discarded.trace()) + n * slack
    if update is SHRINKING:
        # Each update takes λ from r + 1 directions, so for any rank j the eigenvalues after j bound the sum of the λ.
        values = oracles.eigh(matrix).eigenvalues
        assert float(tracked.error_bound) <= min(values[j:].sum() / (r + 1 - j) for j in range(r + 1)) + n * slack
        return
    # Each of the r values may lose what its form treats as 0: 8 ε·d₁, or the shift of a Cholesky factor.
    noise = r * (8 if update.is_exact else 32) * oracles.epsilon(dtype) * peak
    best = float((matrix - truncated).trace())
    assert float(error.trace()) <= (1.001 if update.is_exact else 1.10) * best + noise
    if update.is_exact and stream in WITH_A_GAP:
        # Every update adds a rounding of a few ε·d₁, which decays as the matrix does.
        assert oracles.spectral_norm(dense(held) - truncated) <= slack
        values = values_of(held)
        assert (values.diff() <= 0).all()
        assert (values - oracles.eigh(truncated).eigenvalues[:r]).abs().max() <= slack
        assert (update.factor is brandla.LowRankEigh) or torch.equal(held.gram, torch.diag(values))


# A stream, its rows, k, the largest rank, and the number of batches: the rank has room for every direction.
WHOLE = {
    **{stream: (stream, 48, 8, 48, 12) for stream in oracles.STREAMS},
    "sixteen directions in 32 columns": ("rank-16", 64, 32, 24, 20),
    "four directions in 32 columns": ("repeated-8", 64, 32, 24, 5),
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("update", UPDATES, ids=str)
def test_a_stream_without_truncation_loses_nothing(update, case, dtype):
    stream, m, k, most, count = WHOLE[case]
    # Once it holds m columns, the Cholesky form chooses between columns and leaves out small parts.
    count = count if update.is_exact or most < m else m // k
    held = update.zeros(m, m + 2, 0, dtype=dtype)
    value, matrix = brandla.track(held) if update.is_symmetric else held, dense(held)
    sizes = (m,) if update.is_symmetric else (m, m + 2)
    sides = [oracles.batches(stream, size, k, count, seed=size - m, dtype=dtype) for size in sizes]
    for step, data in enumerate(zip(*sides, strict=True), start=1):
        rank = min(most, k * step)
        value, matrix = update(value, *data, rank=rank), update.untruncated(matrix, *data)
        held = value.lowrank if update.is_symmetric else value
        assert_factor(held, m, rank)
    norm = oracles.spectral_norm(matrix)
    slack = oracles.tolerance(m, dtype, norm) if most < m else 2 * oracles.rounding(m, dtype, norm)
    assert oracles.spectral_norm(dense(held) - matrix) <= slack
    assert not update.is_symmetric or value.error_bound <= slack


@pytest.mark.parametrize("update", [EIGH_UPDATE, ROOT_UPDATE], ids=str)
def test_empty_coordinates_cost_the_others_no_accuracy(update, dtype):
    """Beside zero columns, and values that are small against their sum, the loss is still relative to d₁."""
    n, r, k = 128, 24, 32
    held, matrix = update.factor.zeros(n, r, dtype=dtype), torch.zeros(n, n, dtype=torch.float64)
    for columns in oracles.batches("rank-16", n, k, 6, dtype=dtype, seed=1):
        held, matrix = update(held, columns, decay=0.95, weight=0.05), oracles.updated(matrix, columns, 0.95, 0.05)
        error = oracles.spectral_norm(matrix - dense(held))
        assert error <= 16 * oracles.epsilon(dtype) * oracles.spectral_norm(matrix)


@pytest.mark.slow
@pytest.mark.parametrize("update", [*SYMMETRIC_UPDATES, SVD_UPDATE], ids=str)
@pytest.mark.parametrize(("n", "r", "k", "count"), [(64, 12, 8, 200), (24, 6, 2, 1000)], ids=["hundreds", "thousand"])
def test_many_updates_do_not_drift(update, n, r, k, count):
    """All streams run at once, and repeat their first batches to save the time of drawing more."""
    period, names = 50, oracles.STREAMS
    data = [
        torch.stack([torch.stack(oracles.batches(name, size, k, period, dtype=torch.float32)) for name in names], dim=1)
        for size in ((n,) if update.is_symmetric else (n, n - 6))
    ]
    value = update.zeros(n, n - 6, r, batch_shape=(len(names),), dtype=torch.float32)
    for step in range(count):
        value = update(value, *(side[step % period] for side in data), decay=0.95, weight=0.05)
        if step % (count // 10) == count // 10 - 1:
            defects = zip(names, map(defect, members(value)), strict=True)
            ratios = {name: size / oracles.epsilon(torch.float32) for name, size in defects}
            assert {name: ratio for name, ratio in ratios.items() if not ratio <= ORTHONORMAL} == {}


# Decay, k, scale of the columns, and whether a column is repeated.
STEPS = st.tuples(
    st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.integers(0, 14), st.sampled_from([0.0, 1e-6, 1.0, 1e4]), st.booleans()
)


@settings(max_examples=25)
@given(
    sequence=st.lists(STEPS, min_size=1, max_size=8),
    rank=st.integers(0, 12),
    is_double=st.booleans(),
    seed=st.integers(0, 10),
)
@pytest.mark.parametrize("update", SYMMETRIC_UPDATES, ids=str)
def test_any_sequence_stays_between_zero_and_the_truth(update, sequence, rank, is_double, seed):
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
        # A decay of ρ = step/(step + 1) allows the rounding of 1/(1 − ρ) = step + 1 updates.
        assert_underestimates(tracked.lowrank, matrix, peak, step / (step + 1))
        error = oracles.spectral_norm(matrix - dense(tracked.lowrank))
        assert error <= float(tracked.error_bound) + oracles.rounding(n, dtype, peak, step / (step + 1))


def test_the_polish_keeps_columns_orthonormal_after_eigendecompositions_in_float32(monkeypatch):
    # A GPU always decomposes in float32.
    monkeypatch.setattr("brandla._small._SMALL_ORDER", 0)
    monkeypatch.setattr("brandla._small._FLOAT64_COST_RATIO", math.inf)
    value = brandla.LowRankEigh.zeros(128, 24, dtype=torch.float32)
    for columns in oracles.batches("graded", 128, 16, 60, dtype=torch.float32):
        value = EIGH_UPDATE(value, columns, decay=0.95, weight=0.05)
    assert_factor(value, 128, 24)


def test_nothing_shrinks_if_nothing_is_left_out():
    root, columns = ROOT_UPDATE.make(30, 6), make_columns(30, 4)
    for options in ({"rank": 10}, {"weight": 0.0}):
        shrunk, plain = (brandla.root_update(root, columns, **options, shrink=shrink) for shrink in (True, False))
        assert_equals(shrunk, dense(plain))
