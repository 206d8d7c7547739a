"""subspace_update: what it promises beyond eigh_update."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import brandla
import oracles
from builders import dense, make_columns, make_sym
from oracles import THRESHOLD

DECOMPOSITIONS = ["eigh", "eigvalsh", "eig", "svd", "svdvals", "qr", "pinv", "matrix_rank", "lstsq"]


@pytest.mark.parametrize("k", [8, 60], ids=["usual", "k above n - r"])
def test_update_needs_no_decomposition(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        message = "a decomposition that waits for the device"
        raise AssertionError(message)

    sym, columns = make_sym(64, 12, dtype=torch.float32), make_columns(64, k, dtype=torch.float32)
    for name in DECOMPOSITIONS:
        monkeypatch.setattr(torch.linalg, name, forbidden)
        if hasattr(torch.Tensor, name):
            monkeypatch.setattr(torch.Tensor, name, forbidden)

    new = brandla.subspace_update(brandla.track(sym), columns, decay=0.9)
    assert new.lowrank.is_finite()


@pytest.mark.parametrize("spectrum", ["medium", "fast", "graded", "rank-16"])
def test_more_iterations_approach_the_best_truncation(spectrum: str, dtype: torch.dtype) -> None:
    sym, columns = make_sym(64, 12, spectrum, dtype=dtype), make_columns(64, 8, dtype=dtype)
    matrix = oracles.updated(dense(sym), columns)
    reference = oracles.eigh(matrix)
    best = float(reference.eigenvalues[12:].sum())
    scale = float(reference.eigenvalues[0])
    lost = [
        float((matrix - dense(brandla.subspace_update(sym, columns, iterations=iterations))).trace())
        for iterations in (1, 2, 4, 60)
    ]
    slack = oracles.tolerance(64, dtype, scale)
    assert all(later <= earlier + slack for earlier, later in pairwise(lost))
    assert lost[-1] <= 1.001 * best + slack
    assert lost[1] <= 1.25 * best + slack


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_small_values_of_a_dense_core_survive_the_iterations(iterations: int, dtype: torch.dtype) -> None:
    # The columns of such a core are nearly parallel: a coarse orthonormalisation between two products would lose some.
    r = 24
    core = oracles.psd_matrix(torch.logspace(0, -6, r, dtype=torch.float64), seed=3)
    sym = brandla.LowRankSym(core.to(dtype), oracles.orthonormal(128, r, seed=4).to(dtype))
    columns = make_columns(128, 4, dtype=dtype, scale=1e-4)
    matrix = oracles.updated(dense(sym), columns)
    reference = oracles.eigh(matrix)
    best = oracles.spectral_norm(matrix - reference.truncation(r))
    error = oracles.spectral_norm(matrix - dense(brandla.subspace_update(sym, columns, iterations=iterations)))
    assert error <= 4 * best + THRESHOLD * oracles.epsilon(dtype)


def test_a_diagonal_core_equals_the_exact_update_where_the_kept_directions_stand_out() -> None:
    sym = brandla.LowRankSym(torch.diag(torch.tensor([4.0, 3.0, 1e-3])).double(), torch.eye(8, 3).double())
    columns = torch.zeros(8, 2, dtype=torch.float64)
    columns[5, 0] = columns[6, 1] = 2.0
    new = brandla.subspace_update(sym, columns, rank=4)
    expected = torch.diag(torch.tensor([4.0, 3.0, 0, 0, 0, 4.0, 4.0, 0])).double()
    assert oracles.difference_ratio(dense(new), expected, torch.float64) <= THRESHOLD


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_core_is_symmetric_and_semi_definite_over_many_updates(iterations: int, dtype: torch.dtype) -> None:
    value = brandla.LowRankSym.zeros(40, 8, dtype=dtype)
    for columns in oracles.batches("repeated-8", 40, 8, 60, dtype=dtype):
        value = brandla.subspace_update(value, columns, decay=0.9, weight=0.1, iterations=iterations)
        assert torch.equal(value.core, value.core.mT)
    values = oracles.eigh(value.core).eigenvalues
    assert values[-1] >= -oracles.tolerance(8, dtype, values[0])


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_a_core_that_rounding_made_indefinite_gives_no_more_than_it_holds(iterations: int) -> None:
    """The Nyström approximation divides by what a column adds, which may be rounding, and may be negative."""
    n, r, k, rank = 60, 16, 4, 12
    eps = torch.finfo(torch.float32).eps
    for seed in range(40):
        core = oracles.psd_matrix(torch.arange(1, r + 1).double() ** -8, seed=seed).float()
        basis = oracles.orthonormal(n, r, seed=seed + 100).float()
        sym = brandla.LowRankSym((core + core.mT) / 2, basis)
        columns = basis @ oracles.gaussian(r, k, seed=seed + 200).float() * 1e-6
        excess = oracles.updated(dense(sym), columns) - dense(
            brandla.subspace_update(sym, columns, rank=rank, iterations=iterations)
        )
        # Rounding of entries of S, which are at most 1, and of U.
        assert -oracles.eigh(excess).eigenvalues[-1] <= 4 * r * eps, seed
