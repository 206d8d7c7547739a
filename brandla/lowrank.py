"""The values that flow through everything: low-rank factorisations as NamedTuples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from brandla import _check
from brandla._core import largest_eigenvalue, safe_eigh
from brandla._sharded import everywhere, rows_of, zero_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class LowRankEigh(NamedTuple):
    """M ≈ U diag(d) Uᵀ for a symmetric positive semi-definite M of order n.

    Parameters
    ----------
    eigenvalues
        d, shape (..., r), descending and >= 0.
    eigenvectors
        U, shape (..., n, r), orthonormal columns. Where the rank of the data runs out, a column whose value is 0 may be
        a zero column instead, so that shapes never depend on the data.

    Examples
    --------
    >>> import torch, brandla
    >>> start = brandla.LowRankEigh.zeros(512, rank=8)
    >>> tracked = brandla.eigh_update(start, torch.randn(512, 32), decay=0.95, weight=0.05)
    >>> tracked.eigenvectors.shape
    torch.Size([512, 8])
    """

    eigenvalues: Tensor
    eigenvectors: Tensor

    @classmethod
    def zeros(
        cls,
        n: int,
        rank: int,
        *,
        batch_shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> LowRankEigh:
        """Start a stream from the zero matrix of order ``n``, with room for ``rank`` eigenpairs.

        Over a 1-D ``mesh`` U is a DTensor sharded on its rows, on the device of each process.
        """
        _sizes("LowRankEigh.zeros", rank, n)
        vectors = zero_rows("LowRankEigh.zeros", mesh, (*batch_shape, n, rank), dtype, device)
        return cls(torch.zeros(*batch_shape, rank, dtype=dtype, device=vectors.device), vectors)

    @property
    def n(self) -> int:
        """Order of the matrix."""
        return self.eigenvectors.shape[-2]

    @property
    def rank(self) -> int:
        """Number of eigenpairs kept."""
        return self.eigenvectors.shape[-1]

    def largest_eigenvalue(self) -> Tensor:
        """Return d₁, of batch shape; 0 at rank 0."""
        return self.eigenvalues[..., 0] if self.rank else self.eigenvalues.sum(-1)

    def dense(self) -> Tensor:
        """Return U diag(d) Uᵀ, shape (..., n, n): for tests and small cases."""
        values, vectors = map(everywhere, self)
        return (vectors * values[..., None, :]) @ vectors.mT

    def is_finite(self) -> Tensor:
        """Return, with no device sync, a bool tensor of batch shape: False where non-finite data came in."""
        return torch.isfinite(self.eigenvalues).all(-1)


class LowRankSym(NamedTuple):
    """M ≈ U S Uᵀ with a small dense S: the form that is updated with no eigendecomposition.

    Parameters
    ----------
    core
        S, shape (..., r, r), symmetric positive semi-definite.
    basis
        U, shape (..., n, r), orthonormal columns; a column whose row of S is 0 may be a zero column, which spans
        nothing; if it is not, M is 0 along it.
    """

    core: Tensor
    basis: Tensor

    @classmethod
    def zeros(
        cls,
        n: int,
        rank: int,
        *,
        batch_shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> LowRankSym:
        """Start a stream from the zero matrix of order ``n``, with room for a basis of ``rank`` columns.

        Over a 1-D ``mesh`` U is a DTensor sharded on its rows, on the device of each process.
        """
        _sizes("LowRankSym.zeros", rank, n)
        basis = zero_rows("LowRankSym.zeros", mesh, (*batch_shape, n, rank), dtype, device)
        return cls(torch.zeros(*batch_shape, rank, rank, dtype=dtype, device=basis.device), basis)

    @classmethod
    def from_eigh(cls, eigh: LowRankEigh) -> LowRankSym:
        """Take over a LowRankEigh: S = diag(d)."""
        return cls(torch.diag_embed(eigh.eigenvalues), eigh.eigenvectors)

    @property
    def n(self) -> int:
        """Order of the matrix."""
        return self.basis.shape[-2]

    @property
    def rank(self) -> int:
        """Number of basis columns."""
        return self.basis.shape[-1]

    def eigh(self) -> LowRankEigh:
        """Diagonalise S into a LowRankEigh, by an eigendecomposition of order r that waits for the device.

        U keeps its span: a column whose row of S is 0 becomes a column of value 0 as it is.
        """
        function = "LowRankSym.eigh"
        rows = rows_of(function, "basis", self.basis, self.core)
        core = rows.small(function, "core", self.core)
        values, rotation = safe_eigh(core)
        rotation = rotation + _empty_coordinates(core)
        vectors = rows.local(function, "basis", self.basis) @ rotation
        return LowRankEigh(rows.small_result(values), rows.tall_result(vectors))

    def largest_eigenvalue(self) -> Tensor:
        """Estimate the largest eigenvalue from below by power iteration on S, of batch shape, with no sync."""
        rows = rows_of("LowRankSym.largest_eigenvalue", "basis", self.basis, self.core)
        core = rows.small("LowRankSym.largest_eigenvalue", "core", self.core)
        return rows.small_result(largest_eigenvalue(core))

    def dense(self) -> Tensor:
        """Return U S Uᵀ, shape (..., n, n): for tests and small cases."""
        core, basis = map(everywhere, self)
        return basis @ core @ basis.mT

    def is_finite(self) -> Tensor:
        """Return, with no device sync, a bool tensor of batch shape: False where non-finite data came in."""
        return torch.isfinite(self.core).all(-1).all(-1)


class LowRankSVD(NamedTuple):
    """X ≈ U diag(S) Vh, fields as in ``torch.linalg.svd``.

    Parameters
    ----------
    U
        Left singular vectors, shape (..., m, r), orthonormal columns.
    S
        Singular values, shape (..., r), descending and >= 0.
    Vh
        Right singular vectors as rows, shape (..., r, n). Where a value is 0, its column of U and its row of Vh may be
        zero.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def zeros(
        cls,
        m: int,
        n: int,
        rank: int,
        *,
        batch_shape: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> LowRankSVD:
        """Start a stream from the zero matrix of shape (m, n), with room for ``rank`` singular triplets.

        ``n = 0`` starts a stream of appended columns; ``rank`` may then exceed ``n``. Over a 1-D ``mesh`` U is a
        DTensor sharded on its rows, on the device of each process.
        """
        _sizes("LowRankSVD.zeros", rank, m)
        left = zero_rows("LowRankSVD.zeros", mesh, (*batch_shape, m, rank), dtype, device)
        values = torch.zeros(*batch_shape, rank, dtype=dtype, device=left.device)
        return cls(left, values, torch.zeros(*batch_shape, rank, n, dtype=dtype, device=left.device))

    @property
    def rank(self) -> int:
        """Number of singular triplets kept."""
        return self.S.shape[-1]

    def dense(self) -> Tensor:
        """Return U diag(S) Vh, shape (..., m, n): for tests and small cases."""
        left, values, right = map(everywhere, self)
        return (left * values[..., None, :]) @ right

    def is_finite(self) -> Tensor:
        """Return, with no device sync, a bool tensor of batch shape: False where non-finite data came in."""
        return torch.isfinite(self.S).all(-1)


def _empty_coordinates(core: Tensor) -> Tensor:
    """Return the unit vectors of what `safe_eigh` leaves out, as the last columns; the others are zero."""
    empty, order = (core.diagonal(dim1=-2, dim2=-1) <= 0).to(core.dtype).sort(stable=True)
    identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    return identity[order].mT * empty[..., None, :]


Factor = TypeVar("Factor", LowRankEigh, LowRankSym)


class Tracked(NamedTuple, Generic[Factor]):
    """A factor together with a running bound on its distance from the matrix it stands for.

    Start one with `track`; the update functions take it in place of the factor and return the next one. The bound
    is carried along on the device: it costs no pass over tall matrices and no sync.

    Parameters
    ----------
    lowrank
        The LowRankEigh or LowRankSym.
    error_bound
        Tensor of batch shape: an upper bound of ‖M − M̂‖₂, up to rounding: a few ε·‖M‖ an
        update, and up to a hundred ε·‖M‖ in all where batches are rank-deficient.
    """

    lowrank: Factor
    error_bound: Tensor


def track(lowrank: Factor) -> Tracked[Factor]:
    """Attach an error bound of 0 to a factor that stands for its matrix exactly."""
    values = lowrank[0]
    batch_shape = lowrank[1].shape[:-2]
    return Tracked(lowrank, values.new_zeros(batch_shape))


def _sizes(function: str, rank: int, n: int) -> None:
    _check.count(function, "rank", rank, 0)
    if rank > n:
        _check.fail_value(function, f"rank must not exceed the number of rows, {n}; got {rank}")


class Centred(NamedTuple):
    """The left half of an SVD of columns less their mean, with the mean: a streaming principal component analysis.

    Start one with `centre` and feed it to `brandla.svd_append`. ``svd.U`` holds the principal axes, and
    ``svd.S² / weight`` the variances along them. Right vectors are not kept: a moving mean moves every column seen.

    Parameters
    ----------
    svd
        LowRankSVD with an empty Vh (..., r, 0).
    mean
        Shape (..., m): the mean of the columns so far, weighted as decay weights them.
    weight
        Tensor of batch shape: the number of columns so far, weighted in the same way.
    """

    svd: LowRankSVD
    mean: Tensor
    weight: Tensor


def centre(svd: LowRankSVD) -> Centred:
    """Start a centred stream from an SVD that has seen no columns, such as ``LowRankSVD.zeros(m, 0, rank)``.

    Raises
    ------
    ValueError
        If ``svd`` holds columns: their mean is not known.
    """
    _check.svd("centre", "svd", svd)
    if svd.Vh.shape[-1] != 0:
        rule = "svd must have seen no columns, since their mean is not known"
        _check.fail_value("centre", f"{rule}; its Vh has {svd.Vh.shape[-1]}; start from LowRankSVD.zeros(m, 0, rank)")
    rows = rows_of("centre", "svd.U", svd.U, svd.S)
    left = rows.local("centre", "svd.U", svd.U)
    mean = rows.tall_result(left.new_zeros(left.shape[:-1]), -1)
    return Centred(svd, mean, rows.small_result(left.new_zeros(left.shape[:-2])))
