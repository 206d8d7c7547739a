"""Rank(max, tol): a rank that adapts to the spectrum within fixed shapes."""

import pytest
import torch

import brandla
import oracles
from builders import defect, dense, make_columns, make_svd, tall_of, values_of
from oracles import ORTHONORMAL, THRESHOLD


def kept(value):
    """Return the number of columns in use."""
    return int(tall_of(value).any(-2).sum())


@pytest.mark.parametrize("tol", [0.0, 1e-2, 0.3])
def test_values_under_the_tolerance_leave_with_their_vectors(update, tol, dtype):
    n, r, k = 50, 12, 8
    old, columns = update.make(n, r, dtype=dtype), make_columns(n, k, dtype=dtype, scale=0.1)
    new = update(brandla.track(old), columns, rank=brandla.Rank(max=12, tol=tol))
    factor, matrix = new.lowrank, oracles.updated(dense(old), columns)
    values = oracles.eigh(matrix).eigenvalues
    slack, largest = oracles.tolerance(n, dtype, values[0]), float(values[0])
    assert tall_of(factor).shape == (n, 12)
    # The diagonal of S is near to its eigenvalues only, so the Cholesky form may keep one fewer or one more.
    wanted = min(12, int((values > tol * largest).sum()))
    assert abs(kept(factor) - wanted) <= (not update.is_exact)
    assert int((values_of(factor) > 0).sum()) == kept(factor)
    assert defect(factor) <= ORTHONORMAL * oracles.epsilon(dtype)
    assert oracles.eigh(matrix - dense(factor)).eigenvalues[-1] >= -slack
    error = oracles.spectral_norm(matrix - dense(factor))
    assert error <= float(new.error_bound) + slack
    assert error <= 1.5 * max(tol * largest, float(values[12])) + slack
    # No tolerance is the number.
    by_number = update(brandla.track(old), columns, rank=12)
    assert tol or all(torch.equal(a, b) for a, b in zip(factor, by_number.lowrank, strict=True))


def test_tolerance_holds_without_new_columns(update, dtype):
    values = torch.tensor([1.0, 0.5, 1e-3], dtype=dtype)
    old = brandla.LowRankEigh(values, oracles.orthonormal(20, 3, 1).to(dtype))
    old = old if update.is_orthonormal else brandla.LowRankRoot.from_eigh(old)
    new = update(brandla.track(old), make_columns(20, 0, dtype=dtype), rank=brandla.Rank(max=3, tol=0.1))
    assert kept(new.lowrank) == 2
    # What was left out, 1e-3, to the rounding of d₁ = 1.
    assert abs(float(new.error_bound) - 1e-3) <= oracles.tolerance(20, dtype, 1.0)


def test_columns_that_left_are_used_again(update, dtype):
    n, rule = 50, brandla.Rank(max=12, tol=1e-2)
    value = update.factor.zeros(n, 12, dtype=dtype)
    one = make_columns(n, 1, dtype=dtype)
    for _ in range(3):
        value = update(value, one, decay=0.5, rank=rule)
    assert kept(value) == 1
    for columns in oracles.batches("flat", n, 8, 30, dtype=dtype):
        value = update(value, columns, decay=0.9, weight=0.1, rank=rule)
    assert kept(value) == 12
    assert defect(value) <= ORTHONORMAL * oracles.epsilon(dtype)


def test_svd_takes_a_rule_of_singular_values(dtype):
    old = make_svd(40, 31, 8, "slow", dtype=dtype)
    left, right = (make_columns(n, 6, dtype=dtype, seed=seed, scale=0.1) for n, seed in ((40, 3), (31, 4)))
    rule = brandla.Rank(max=10, tol=0.4)
    for new, matrix in (
        (brandla.svd_update(old, left, right, rank=rule), dense(old) + left.double() @ right.double().mT),
        (brandla.svd_append(old, left, rank=rule), torch.cat([dense(old), left.double()], dim=1)),
    ):
        _, values = oracles.svd_truncation(matrix, 1)
        wanted = int((values > 0.4 * values[0]).sum())
        truncation, _ = oracles.svd_truncation(matrix, wanted)
        assert new.S.shape == (10,)
        assert int((new.S > 0).sum()) == wanted
        assert not new.U[:, wanted:].any()
        assert oracles.difference_ratio(dense(new), truncation, dtype) <= THRESHOLD
