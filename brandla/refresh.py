"""The basis of a stream of wide matrices, refreshed by products: the step of SOAP, KL-Shampoo, COSMOS and Dion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import WHOLE
from brandla.lowrank import LowRankEigh, over
from brandla.orthonormal import orthonormalize
from brandla.randomized import LinearOperator, adjoint_product, check_matrix, product, scale_of
from brandla_kernels import project, reads_are_free, tall


@ranged("n,r", "n,m")
def eigh_refresh(
    eigh: LowRankEigh,
    matrix: Tensor | LinearOperator,
    *,
    decay: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    iterations: int = 1,
) -> tuple[LowRankEigh, Tensor]:
    """Take a wide G into an eigenbasis: one step of subspace iteration with ``decay * U diag(d) Uᵀ + weight * G Gᵀ``.

    For G (n, m) with m near n or above, where `brandla.eigh_update` would save nothing. G Gᵀ is never formed: G
    meets blocks of r columns, 4nmr flops an iteration and 2nmr for the values. Nothing waits for the device, and a
    CUDA graph can capture it. Raises as `eigh_update` does.

    Parameters
    ----------
    eigh
        d (..., r) and U (..., n, r). A zero column is begun anew. From ``LowRankEigh.zeros(n, r)`` a GPU and a CPU may
        find other bases of one span.
    matrix
        G, a tensor (..., n, m), half precision beside a float32 factor included, or a linear operator (n, m) with
        a transpose.
    decay, weight
        ρ and w, >= 0: numbers, or tensors of batch shape.
    iterations
        Products with the matrix, each followed by orthonormalisation. 1 serves on a stream, whose basis moves little.

    Returns
    -------
    LowRankEigh
        Values diag(QᵀMQ), descending, and the vectors Q that they belong to; of the same rank.
    Tensor
        The permutation p (..., r), int64: vector i of the result continues vector p[i] of ``eigh``. What is kept for
        each old vector moves along: second moments ``v`` (..., r) by ``v.gather(-1, p)``, rows ``v`` (r, m) by
        ``v[p]``. Vectors with equal values keep their order.

    Notes
    -----
    On a stationary stream U converges to the leading eigenspace of M: by the factor d_{r+1}/d_r a step. The vectors
    themselves do so more slowly where their values are close, and Q is not turned within its span to diagonalise
    QᵀMQ, which would take an eigendecomposition and would mix what belongs to single vectors. The values are the
    diagonal of QᵀMQ all the same, and their sum is tr(QᵀMQ). Squares of the entries of G must be in range.

    References
    ----------
    N. Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321, for the use.

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
    function, name = "eigh_refresh", "eigh.eigenvectors"
    _check.eigh(function, "eigh", eigh)
    values, vectors = eigh
    WHOLE.admit(function, name, vectors)
    rows, _ = check_matrix(function, matrix)
    if isinstance(matrix, Tensor):
        matrix = _check.columns(function, "matrix", matrix, name, vectors)
    elif vectors.shape[:-1] != (rows,):
        rule = f"a linear operator of {rows} rows needs {name} of shape ({rows}, r)"
        _check.fail_value(function, f"{rule}; got {tuple(vectors.shape)}")
    decay = _check.scalar(function, "decay", decay, name, vectors)
    weight = _check.scalar(function, "weight", weight, name, vectors)
    _check.count(function, "iterations", iterations, 1)
    average = _Average(vectors, (values * over(decay))[..., None], matrix, over(weight, 2))
    for _ in range(iterations):
        image = average.image(_begun(vectors))
        vectors, _ = orthonormalize(image / scale_of(image))
    values, order = average.quotients(vectors).sort(dim=-1, descending=True, stable=True)
    return LowRankEigh(values, tall.columns_at(vectors, order)), order


class _Average(NamedTuple):
    """M = U diag(ρd) Uᵀ + w G Gᵀ, in products."""

    vectors: Tensor  # U    (..., n, r)
    values: Tensor  # ρd    (..., r, 1)
    matrix: Tensor | LinearOperator
    weight: float | Tensor  # or (..., 1, 1)

    def image(self, block: Tensor) -> Tensor:
        """Return M X."""
        old, new = self._coefficients(block)
        return self.vectors @ (self.values * old) + product("eigh_refresh", self.matrix, self.weight * new)

    def quotients(self, block: Tensor) -> Tensor:
        """Return the diagonal of XᵀMX, of sums of squares."""
        old, new = self._coefficients(block)
        return (self.values * old.square()).sum(-2) + (self.weight * new.square()).sum(-2)

    def _coefficients(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return UᵀX and GᵀX."""
        return project(self.vectors, block), adjoint_product("eigh_refresh", self.matrix, block)


def _begun(vectors: Tensor) -> Tensor:
    """Return U with its zero columns begun anew, orthogonal to the others, from cos(i²j): dense and nearly independent.

    What lay in the span of the others would outweigh them in M U, and take their places.
    """
    empty = (vectors == 0).all(-2, keepdim=True)
    if reads_are_free(vectors) and not empty.any().item():
        return vectors
    n, r = vectors.shape[-2:]
    row, column = (torch.arange(1, size + 1, dtype=torch.float64, device=vectors.device) for size in (n, r))
    fresh = (torch.cos(row.square()[:, None] * column) * (2 / n) ** 0.5).to(vectors.dtype).expand_as(vectors)
    return torch.where(empty, tall.subtract_product(fresh, vectors, project(vectors, fresh)), vectors)
