"""Eigenbases brought up to date with a matrix: by products with wide data, or in part by Rayleigh–Ritz.

The products, `eigh_refresh`, are the step of SOAP, KL-Shampoo, COSMOS and Dion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import UNSHARDED
from brandla._small import safe_eigh
from brandla.lowrank import LowRankEigh, Number, add_dims, stack_numbers
from brandla.orthonormal import factorize, times
from brandla.randomized import Matrix, check_matrix, product, scale_of
from brandla_kernels import Tall, project, reads_are_free, rotate, tall


@ranged("n,r", "n,m")
def eigh_refresh(
    eigh: LowRankEigh, matrix: Matrix, *, decay: Number = 1.0, weight: Number = 1.0, iterations: int = 1
) -> tuple[LowRankEigh, Tensor]:
    """Update an eigenbasis by a wide G: one step of subspace iteration with ``decay * U diag(d) Uᵀ + weight * G Gᵀ``.

    For G (n, m) with m near n or above, where `brandla.eigh_update` would save nothing. G Gᵀ is never formed: G
    multiplies blocks of r columns, with 4nmr flops an iteration and 2nmr for the values. The host never waits for the
    device, and a CUDA graph can capture the call. Raises as `eigh_update` does.

    Parameters
    ----------
    eigh
        d (..., r) and U (..., n, r). A zero column starts again. From ``LowRankEigh.zeros(n, r)``, a GPU and a CPU may
        find different bases of one span.
    matrix
        G, a tensor (..., n, m), or a linear operator (n, m) with a transpose. Half precision may meet a float32 factor.
        Squares of its entries must be in range.
    decay, weight
        ρ and w, as in `eigh_update`.
    iterations
        Products with the matrix, each followed by orthonormalisation. 1 is enough on a stream: its basis moves little.

    Returns
    -------
    LowRankEigh
        Vectors Q of the same rank, not turned within their span, and their values diag(QᵀMQ), descending.
    Tensor
        The permutation p (..., r), int64: vector i of the result continues vector p[i] of ``eigh``. If you keep data
        for each old vector, move it along: second moments ``v`` (..., r) by ``v.gather(-1, p)``, rows ``v`` (r, m) by
        ``v[p]``. Vectors with equal values keep their order.

    Notes
    -----
    Convergence: ``docs/updates.md``. Source of the use: N. Vyas et al., "SOAP: Improving and Stabilizing Shampoo using
    Adam", arXiv 2409.11321.

    Examples
    --------
    >>> import torch, brandla
    >>> eigh, moments = brandla.LowRankEigh.zeros(64, rank=8), torch.zeros(8, 100)
    >>> for _ in range(5):
    ...     gradient = torch.randn(64, 100)
    ...     eigh, permutation = brandla.eigh_refresh(eigh, gradient, decay=0.95, weight=0.05)
    ...     moments = moments[permutation].lerp((eigh.eigenvectors.mT @ gradient).square(), 0.05)
    >>> moments.shape
    torch.Size([8, 100])
    """
    return check_refresh("eigh_refresh", eigh, matrix, decay, weight, iterations).result()


def check_refresh(
    function: str, eigh: LowRankEigh, matrix: Matrix, decay: Number, weight: Number, iterations: int
) -> Refresh:
    """Check the arguments of `eigh_refresh`."""
    name = "eigh.eigenvectors"
    _check.eigh(function, "eigh", eigh)
    values, vectors = eigh
    UNSHARDED.check_kind(function, name, vectors)
    rows, _ = check_matrix(function, matrix)
    if isinstance(matrix, Tensor):
        matrix = _check.columns(function, "matrix", matrix, name, vectors)
    elif vectors.shape[:-1] != (rows,):
        rule = f"a linear operator of {rows} rows needs {name} of shape ({rows}, r)"
        _check.fail_value(function, f"{rule}; got {tuple(vectors.shape)}")
    decay = _check.scalar(function, "decay", decay, name, vectors)
    weight = _check.scalar(function, "weight", weight, name, vectors)
    _check.count(function, "iterations", iterations, 1)
    return Refresh(values, vectors, matrix, decay, weight, iterations)


class Refresh(NamedTuple):
    """M = U diag(ρd) Uᵀ + w G Gᵀ, the checked arguments: of one factor, of a batch, or of a list with d stacked."""

    values: Tensor  # d     (..., r)
    vectors: Tall  # U      (..., n, r)
    matrix: Any  # G        (..., n, m), or an operator
    decay: Number
    weight: Number
    iterations: int

    def result(self) -> tuple[LowRankEigh, Tensor]:
        """Return the factor, or the batch, with its permutation."""
        values, vectors, order = self.parts()
        return LowRankEigh(values, vectors), order

    def parts(self) -> tuple[Tensor, Tall, Tensor]:
        """Return the new values, vectors and permutations."""
        # ρd replaces d. ρd and w get the dimensions with which they multiply coefficients.
        scaled = self._replace(values=(self.values * add_dims(self.decay))[..., None], weight=add_dims(self.weight, 2))
        vectors = self.vectors
        for _ in range(self.iterations):
            block = _with_fresh_columns(vectors)
            old, new = scaled._coefficients(block)
            # M X is divided by a power of two near its largest entry or, for a list, near the largest of diag(XᵀMX).
            if isinstance(block, list):
                scale = scale_of(scaled._quotients(old, new)[..., None, :])
                image = rotate(self.vectors, self.matrix, scaled.values * old / scale, scaled.weight * new / scale)
            else:
                image = self.vectors @ (scaled.values * old) + product("eigh_refresh", self.matrix, scaled.weight * new)
                image = image / scale_of(image)
            nearly, transform, _ = factorize(image)
            vectors = times(nearly, transform)
        quotients = scaled._quotients(*scaled._coefficients(vectors))
        values, order = quotients.sort(dim=-1, descending=True, stable=True)
        if isinstance(vectors, list):
            return values, times(nearly, tall.columns_at(transform, order)), order
        return values, tall.columns_at(vectors, order), order

    def _quotients(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the diagonal of XᵀMX as sums of squares of UᵀX and GᵀX."""
        return (self.values * old.square()).sum(-2) + (self.weight * new.square()).sum(-2)

    def _coefficients(self, block: Tall) -> tuple[Tensor, Tensor]:
        """Return UᵀX and GᵀX."""
        listed = isinstance(block, list)
        image = project(self.matrix, block) if listed else product("eigh_refresh", self.matrix, block, adjoint=True)
        return project(self.vectors, block), image


def refresh_together(problems: Sequence[Refresh]) -> list[tuple[LowRankEigh, Tensor]]:
    """Refresh factors of one rank, each by its dense matrix."""
    values, vectors, matrices, decays, weights, (iterations, *_) = zip(*problems, strict=True)
    stacked = torch.stack(values)
    wide = [matrix.to(stacked.dtype) for matrix in matrices]
    numbers = stack_numbers(decays, stacked), stack_numbers(weights, stacked)
    parts = Refresh(stacked, list(vectors), wide, *numbers, iterations).parts()
    return [(LowRankEigh(*factor), order) for *factor, order in zip(*parts, strict=True)]


def _with_fresh_columns(vectors: Tall) -> Tall:
    """Replace zero columns of U by columns of cos(i²j), dense and independent, made orthogonal to the others."""
    # Parts of fresh columns in the span of the others would outweigh the others in M U, and take their places.
    members = vectors if isinstance(vectors, list) else [vectors]
    if reads_are_free(members[0]) and not any((member == 0).all(-2).any().item() for member in members):
        return vectors
    sizes, device, dtype = (tall.rows(vectors), tall.columns(vectors)), tall.device_of(vectors), tall.dtype_of(vectors)
    row, column = (torch.arange(1, size + 1, dtype=torch.float64, device=device) for size in sizes)
    table = torch.cos(row.square()[:, None] * column)
    if isinstance(vectors, Tensor):
        fresh = (table * (2 / sizes[0]) ** 0.5).to(dtype).expand_as(vectors)
        empty = (vectors == 0).all(-2, keepdim=True)
        return torch.where(empty, tall.subtract_product(fresh, vectors, project(vectors, fresh)), vectors)
    table = table.to(dtype)
    tables: Any = [table[: len(member)] for member in vectors]
    coefficients = project(vectors, tables)
    # Only a zero column is orthogonal to all columns of a table.
    empty = (coefficients == 0).all(-1).to(dtype)
    lengths = empty * add_dims(stack_numbers([(2 / len(member)) ** 0.5 for member in vectors], coefficients))
    kept = torch.diag_embed(1 - empty) - coefficients * lengths[..., None, :]
    return rotate(vectors, tables, kept, torch.diag_embed(lengths))


def ritz_correct(eigh: LowRankEigh, matrix: Tensor, subset: Tensor) -> LowRankEigh:
    """Replace some eigenpairs by the Ritz pairs of M in the span of their vectors, and sort.

    Rayleigh–Ritz: E, V = eigh(UₛᵀMUₛ), then Uₛ ← Uₛ V and dₛ ← E, for the indices s of ``subset`` (m,), int64, and a
    symmetric positive semi-definite M (..., n, n). This removes the truncation errors that updates left in these
    directions. Raises as `brandla.eigh_update` does.
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
