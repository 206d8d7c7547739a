"""Brand's updates: a truncated eigen- or singular value decomposition kept up to date while data streams in."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from brandla import _check
from brandla._core import polish, safe_eigh, safe_svd
from brandla._expansion import expand
from brandla.lowrank import LowRankEigh, LowRankSVD, Tracked
from brandla.orthonormal import Split, split


@overload
def eigh_update(
    eigh: LowRankEigh,
    columns: Tensor,
    *,
    decay: float | Tensor = ...,
    weight: float | Tensor = ...,
    rank: int | None = ...,
) -> LowRankEigh: ...


@overload
def eigh_update(
    eigh: Tracked[LowRankEigh],
    columns: Tensor,
    *,
    decay: float | Tensor = ...,
    weight: float | Tensor = ...,
    rank: int | None = ...,
) -> Tracked[LowRankEigh]: ...


def eigh_update(
    eigh: LowRankEigh | Tracked[LowRankEigh],
    columns: Tensor,
    *,
    decay: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    rank: int | None = None,
) -> LowRankEigh | Tracked[LowRankEigh]:
    """Best rank-``rank`` truncation of ``decay * U diag(d) Uᵀ + weight * A Aᵀ``.

    Equivalent to the leading eigenpairs of ``torch.linalg.eigh(decay * eigh.dense() + weight * A @ A.mT)``, in
    O(n (r + k)²) + O((r + k)³) operations in place of O(n³), and with no n × n matrix.

    Parameters
    ----------
    eigh
        d (..., r) and U (..., n, r), or a :class:`Tracked` one, whose error bound is then carried along.
    columns
        A, shape (..., n, k), in the dtype of the factor, or in bfloat16/float16 beside a float32 factor.
    decay, weight
        ρ and w, >= 0: numbers, or tensors of batch shape. For an exponential average ρ and 1 − ρ, with the
        normalisation of the data (such as 1/√k) inside A.
    rank
        Rank of the result: at most min(n, r + k), by default the old rank r.

    Returns
    -------
    LowRankEigh or Tracked
        As ``eigh`` was. New tensors: nothing is modified or shared.

    Raises
    ------
    ValueError, TypeError
        For shapes, values, dtypes and devices that do not fit, before anything is computed.
    RuntimeError
        If the (r + k)-order eigendecomposition fails even in float64.

    Notes
    -----
    Two projection passes keep ‖UᵀU − I‖₂ at a small multiple of ε over any number of updates, on rank-deficient data
    too: columns inside the span of U, or repeated, add no basis vector. The result never exceeds the matrix it stands
    for (0 ⪯ M̂ ⪯ M, to rounding). The eigendecomposition waits for the device; :func:`brandla.subspace_update` does
    not.

    References
    ----------
    M. Brand, "Fast low-rank modifications of the thin singular value decomposition", Linear Algebra Appl. 415 (2006),
    section 4. Derivation: ``docs/brand.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> old = brandla.LowRankEigh.zeros(100, rank=4, dtype=torch.float64)
    >>> new = brandla.eigh_update(old, torch.eye(100, 6, dtype=torch.float64), decay=0.9, weight=0.5)
    >>> new.eigenvalues
    tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    function = "eigh_update"
    factor, bound = (eigh.lowrank, eigh.error_bound) if isinstance(eigh, Tracked) else (eigh, None)
    _check.eigh(function, "eigh", factor)
    values, vectors = factor
    columns, decay, weight, rank = check_update(function, "eigh.eigenvectors", vectors, columns, decay, weight, rank)
    if columns.shape[-1] == 0 and rank == vectors.shape[-1]:
        decayed = _decayed(decay, values)
        updated = LowRankEigh(decayed, vectors.clone())
        return updated if bound is None else Tracked(updated, decay * bound)
    expansion = expand(values, vectors, columns, decay, weight)
    spectrum, rotation = safe_eigh(expansion.core, vectors.dtype, keep=rank)
    updated = LowRankEigh(spectrum[..., :rank].clone(), expansion.rotate(polish(rotation)))
    if bound is None:
        return updated
    first_dropped = spectrum[..., rank] if spectrum.shape[-1] > rank else torch.zeros_like(bound)
    return Tracked(updated, decay * bound + first_dropped)


def check_update(
    function: str,
    name: str,
    basis: Tensor,
    columns: Tensor,
    decay: float | Tensor,
    weight: float | Tensor,
    rank: int | None,
) -> tuple[Tensor, float | Tensor, float | Tensor, int]:
    """Check what every symmetric update takes besides its factor, and return it in the factor's dtype."""
    columns = _check.columns(function, "columns", columns, name, basis)
    decay = _check.scalar(function, "decay", decay, name, basis)
    weight = _check.scalar(function, "weight", weight, name, basis)
    n, r = basis.shape[-2:]
    k = columns.shape[-1]
    rank = _check.rank(function, rank, r, min(n, r + k), f"min(n, r + k) with n = {n}, r = {r}, k = {k}")
    return columns, decay, weight, rank


def svd_update(
    svd: LowRankSVD, left: Tensor, right: Tensor, *, decay: float | Tensor = 1.0, rank: int | None = None
) -> LowRankSVD:
    """Best rank-``rank`` truncation of ``decay * U diag(S) Vh + left @ right.mT``.

    Equivalent to the leading triplets of ``torch.linalg.svd(decay * svd.dense() + left @ right.mT)``, in
    O((m + n)(r + k)²) + O((r + k)³) operations and with no m × n matrix.

    Parameters
    ----------
    svd
        U (..., m, r), S (..., r), Vh (..., r, n).
    left, right
        Shapes (..., m, k) and (..., n, k).
    decay
        ρ >= 0: a number, or a tensor of batch shape.
    rank
        Rank of the result: at most min(m, n, r + k), by default the old rank r.

    Returns
    -------
    LowRankSVD
        New tensors: nothing is modified or shared.

    Raises
    ------
    ValueError, TypeError
        For shapes, values, dtypes and devices that do not fit, before anything is computed.

    Notes
    -----
    Singular values below 4·ε relative to the largest are rounding noise: they come back as 0 with zero vectors.

    References
    ----------
    M. Brand, Linear Algebra Appl. 415 (2006), section 2. Derivation: ``docs/brand.md``.
    """
    function = "svd_update"
    _check.svd(function, "svd", svd)
    left_vectors, values, right_vectors = svd.U, svd.S, svd.Vh.mT
    left = _check.columns(function, "left", left, "svd.U", left_vectors)
    right = _check.columns(function, "right", right, "svd.Vh.mT", right_vectors)
    if left.shape[-1] != right.shape[-1]:
        _check.fail_value(
            function,
            f"left and right must have the same number k of columns; got {left.shape[-1]} and {right.shape[-1]}",
        )
    decay = _check.scalar(function, "decay", decay, "svd.U", left_vectors)
    m, n, r, k = left_vectors.shape[-2], right_vectors.shape[-2], left_vectors.shape[-1], left.shape[-1]
    most = min(m, n, r + k)
    rank = _check.rank(function, rank, r, most, f"min(m, n, r + k) with m = {m}, n = {n}, r = {r}, k = {k}")
    left_parts, right_parts = split(left_vectors, left), split(right_vectors, right)
    core = _stacked(left_parts) @ _stacked(right_parts).mT
    core[..., :r, :r] += torch.diag_embed(_decayed(decay, values)).double()
    rotation, spectrum, right_rotation = safe_svd(core, values.dtype)
    return LowRankSVD(
        left_parts.rotate(left_vectors, rotation[..., :rank]),
        spectrum[..., :rank].to(values.dtype, copy=True),
        right_parts.rotate(right_vectors, right_rotation[..., :rank]).mT,
    )


def svd_append(svd: LowRankSVD, columns: Tensor, *, decay: float | Tensor = 1.0, rank: int | None = None) -> LowRankSVD:
    """Best rank-``rank`` truncation of ``[decay * U diag(S) Vh, columns]``: streaming PCA and LSI.

    Equivalent to the leading triplets of ``torch.linalg.svd(torch.cat([decay * svd.dense(), columns], dim=-1))``, in
    O(m (r + k)² + n r²) + O((r + k)³) operations.

    Parameters
    ----------
    svd
        U (..., m, r), S (..., r), Vh (..., r, n). ``LowRankSVD.zeros(m, 0, rank)`` starts a stream.
    columns
        A, shape (..., m, k): appended to the right.
    decay
        ρ >= 0: a number, or a tensor of batch shape; below 1 it forgets old columns.
    rank
        Rank of the result: at most min(m, r + k), by default the old rank r.

    Returns
    -------
    LowRankSVD
        With Vh of shape (..., rank, n + k). New tensors: nothing is modified or shared.

    Raises
    ------
    ValueError, TypeError
        For shapes, values, dtypes and devices that do not fit, before anything is computed.

    Notes
    -----
    Vh grows by k columns a call. Where only U and S are wanted, :func:`brandla.eigh_update` on the same columns keeps
    U and S² in constant memory. A rank above the number of columns seen leaves zero triplets.

    References
    ----------
    M. Brand, "Incremental singular value decomposition of uncertain data with missing values", ECCV 2002.
    Derivation: ``docs/brand.md``.
    """
    function = "svd_append"
    _check.svd(function, "svd", svd)
    left_vectors, values, right_rows = svd
    columns = _check.columns(function, "columns", columns, "svd.U", left_vectors)
    decay = _check.scalar(function, "decay", decay, "svd.U", left_vectors)
    m, r = left_vectors.shape[-2:]
    k = columns.shape[-1]
    rank = _check.rank(function, rank, r, min(m, r + k), f"min(m, r + k) with m = {m}, r = {r}, k = {k}")
    parts = split(left_vectors, columns)
    old = torch.diag_embed(_decayed(decay, values)).double()
    old = torch.cat([old, old.new_zeros(*old.shape[:-2], k, r)], dim=-2)
    rotation, spectrum, right_rotation = safe_svd(torch.cat([old, _stacked(parts)], dim=-1), values.dtype)
    right_rotation = right_rotation[..., :rank].to(values.dtype)
    right = torch.cat([right_rows.mT @ right_rotation[..., :r, :], right_rotation[..., r:, :]], dim=-2)
    return LowRankSVD(
        parts.rotate(left_vectors, rotation[..., :rank]), spectrum[..., :rank].to(values.dtype, copy=True), right.mT
    )


def _stacked(parts: Split) -> Tensor:
    return torch.cat([parts.coefficients, parts.triangle], dim=-2)


def _decayed(decay: float | Tensor, values: Tensor) -> Tensor:
    return values * (decay[..., None] if isinstance(decay, Tensor) else decay)
