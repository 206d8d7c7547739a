"""Rayleigh–Ritz correction of part of a tracked eigenbasis against the matrix itself."""

from __future__ import annotations

from torch import Tensor

from brandla import _check
from brandla._small import safe_eigh
from brandla.lowrank import LowRankEigh
from brandla_kernels import tall


def ritz_correct(eigh: LowRankEigh, matrix: Tensor, subset: Tensor) -> LowRankEigh:
    """Replace some eigenpairs by the Ritz pairs of M in the span of their vectors, and sort.

    Solves E, V = eigh(UₛᵀMUₛ), then Uₛ ← Uₛ V and dₛ ← E: the truncation errors that updates left in those directions
    go. Raises as `brandla.eigh_update` does.

    Parameters
    ----------
    eigh
        d (..., r) and U (..., n, r).
    matrix
        M, shape (..., n, n), symmetric positive semi-definite.
    subset
        Indices s of the columns to correct, shape (m,), int64.
    """
    function = "ritz_correct"
    _check.eigh(function, "eigh", eigh)
    matrix = _check.matching_data(function, "matrix", matrix, "eigh", eigh.eigenvectors)
    _check.shape(function, "matrix", matrix, (*eigh.eigenvalues.shape[:-1], eigh.n, eigh.n), "the order of eigh")
    chosen = eigh.eigenvectors.index_select(-1, subset)
    values, rotation = safe_eigh(chosen.mT @ (matrix @ chosen))
    corrected = eigh.eigenvalues.index_copy(-1, subset, values)
    vectors = eigh.eigenvectors.index_copy(-1, subset, chosen @ rotation)
    ordered, order = corrected.sort(descending=True)
    return LowRankEigh(ordered, tall.columns_at(vectors, order))
