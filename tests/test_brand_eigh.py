"""eigh_update when LAPACK fails, and eigh_downdate."""

import pytest
import torch

import brandla
import oracles
from builders import assert_equals, assert_factor, dense, make_columns, make_eigh, make_root


def fail(monkeypatch, failure, *dtypes):
    """Make torch.linalg.eigh fail as on some finite float32 cores, by an exception or NaN; return those matrices."""
    genuine, failures = torch.linalg.eigh, []

    def eigh(matrix, *arguments, **options):
        values, vectors = genuine(matrix, *arguments, **options)
        if matrix.dtype not in dtypes:
            return values, vectors
        failures.append(matrix)
        if failure == "raises":
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return values * torch.nan, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return failures


@pytest.mark.parametrize("failure", ["raises", "NaN"])
@pytest.mark.parametrize("batch_shape", [(), (2,)], ids=str)
@pytest.mark.parametrize("k", [8, 45], ids=["usual", "k above n - r"])
def test_a_failed_float32_eigendecomposition_is_repeated_in_float64(monkeypatch, failure, batch_shape, k):
    # root_update decomposes in float32, while on a CPU eigh_update takes float64 at once.
    old = make_root(50, 12, dtype=torch.float32, batch_shape=batch_shape)
    columns = make_columns(50, k, dtype=torch.float32, batch_shape=batch_shape)
    expected = dense(brandla.root_update(old, columns))
    failures = fail(monkeypatch, failure, torch.float32)
    new = brandla.root_update(old, columns)
    assert failures
    assert new.root.dtype == torch.float32
    for actual, wanted in zip(dense(new).reshape(-1, 50, 50), expected.reshape(-1, 50, 50), strict=True):
        assert oracles.difference_ratio(actual, wanted, torch.float32) <= 2 * oracles.THRESHOLD


def test_an_eigendecomposition_that_fails_in_float64_too_is_reported(monkeypatch):
    old, columns = make_eigh(50, 12, dtype=torch.float32), make_columns(50, 8, dtype=torch.float32)
    fail(monkeypatch, "raises", torch.float32, torch.float64)
    with pytest.raises(RuntimeError, match=r"eigendecomposition.*order 20.*float64.*root_update"):
        brandla.eigh_update(old, columns)


def test_non_finite_data_does_not_reach_the_eigendecomposition(monkeypatch):
    genuine = torch.linalg.eigh

    def strict(matrix):
        assert torch.isfinite(matrix).all()
        return genuine(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", strict)
    old, columns = make_eigh(50, 12, batch_shape=(2,)), make_columns(50, 8, batch_shape=(2,))
    columns[1, 0, 0] = torch.nan
    assert brandla.eigh_update(old, columns).is_finite().tolist() == [True, False]


# --- Downdates


def test_downdate_reverses_an_update(dtype):
    n, r, k, weight = 50, 12, 8, 0.7
    old, columns = make_eigh(n, r, "slow", dtype=dtype), make_columns(n, k, dtype=dtype)
    updated = brandla.eigh_update(old, columns, weight=weight, rank=r + k)
    back = brandla.eigh_downdate(updated, columns, weight=weight)
    assert (back.eigenvalues[r:] == 0).all()
    assert_equals(back, dense(old), oracles.spectral_norm(dense(updated)))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_downdate_is_the_nearest_matrix_in_the_span(scale, dtype):
    n, r, k = 40, 10, 6
    held, columns = make_eigh(n, r, dtype=dtype), make_columns(n, k, scale=scale / n**0.5, dtype=dtype)
    downdated = brandla.eigh_downdate(held, columns)
    span = held.eigenvectors.double() @ held.eigenvectors.double().mT
    compressed = span @ (dense(held) - columns.double() @ columns.double().mT) @ span
    norm = oracles.spectral_norm(dense(held)) + oracles.spectral_norm(columns) ** 2
    assert_equals(downdated, oracles.eigh(oracles.symmetrised(compressed)).truncation(n), norm)
    # For any truth M ⪰ M̂ that holds A Aᵀ, the error in the span does not grow.
    truth = dense(held) + columns.double() @ columns.double().mT
    before, after = (span @ error @ span for error in (truth - dense(held), dense(held) - dense(downdated)))
    assert torch.linalg.matrix_norm(after) <= torch.linalg.matrix_norm(before) + oracles.tolerance(n, dtype, norm)


def test_downdate_ignores_columns_outside_the_span(dtype):
    basis = oracles.orthonormal(40, 16, seed=2).to(dtype)
    held = brandla.LowRankEigh(torch.linspace(2, 1, 10, dtype=dtype), basis[:, :10])
    assert_equals(brandla.eigh_downdate(held, 100 * basis[:, 10:]), dense(held), 100)


@pytest.mark.parametrize(("stream", "rank", "most"), [("slow", 48, 0.0), ("slow", 36, 0.06), ("medium", 24, 0.005)])
def test_a_sliding_window_follows_its_own_decomposition(stream, rank, most, dtype):
    n, k, width = 96, 8, 5
    batches = oracles.batches(stream, n, k, 20, dtype=dtype)
    window, largest = brandla.LowRankEigh.zeros(n, rank, dtype=dtype), 0.0
    for step, columns in enumerate(batches):
        window = brandla.eigh_update(window, columns)
        if step >= width:
            window = brandla.eigh_downdate(window, batches[step - width])
        inside = torch.cat(batches[max(0, step + 1 - width) : step + 1], 1).double()
        exact = oracles.eigh(inside @ inside.mT)
        largest = max(largest, float(exact.eigenvalues[0]))
        error = oracles.spectral_norm(dense(window) - exact.truncation(rank)) / largest
        # A rank of (width + 1) k holds the whole window, and each step rounds twice.
        assert error <= most + 2 * len(batches) * oracles.rounding(n, dtype, 1.0)
    assert_factor(window, n, rank)
