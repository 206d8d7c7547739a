"""Brand's updates: a truncated eigen- or singular value decomposition kept up to date while data streams in."""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from brandla import _check
from brandla._core import polish, safe_eigh, safe_svd, without_denormals
from brandla._expansion import expand
from brandla._ranges import ranged
from brandla._sharded import WHOLE, Rows, rows_of
from brandla._split import Split, split
from brandla._step import Step, Update, check_in_place, check_update, decay_step
from brandla.lowrank import Centred, LowRankEigh, LowRankSVD, Tracked
from brandla.rank import Rank, above, most_of, tolerance_of


@overload
def eigh_update(
    eigh: LowRankEigh,
    columns: Tensor,
    *,
    decay: float | Tensor = ...,
    weight: float | Tensor = ...,
    rank: int | Rank | None = ...,
) -> LowRankEigh: ...


@overload
def eigh_update(
    eigh: Tracked[LowRankEigh],
    columns: Tensor,
    *,
    decay: float | Tensor = ...,
    weight: float | Tensor = ...,
    rank: int | Rank | None = ...,
) -> Tracked[LowRankEigh]: ...


@ranged("n,r", "n,k")
def eigh_update(
    eigh: LowRankEigh | Tracked[LowRankEigh],
    columns: Tensor,
    *,
    decay: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    rank: int | Rank | None = None,
) -> LowRankEigh | Tracked[LowRankEigh]:
    """Best rank-``rank`` truncation of ``decay * U diag(d) Uᵀ + weight * A Aᵀ``.

    Equivalent to the leading eigenpairs of ``torch.linalg.eigh(decay * eigh.dense() + weight * A @ A.mT)``, in
    O(n (r + k)²) + O((r + k)³) operations in place of O(n³), and with no n × n matrix.

    Parameters
    ----------
    eigh
        d (..., r) and U (..., n, r), or a `Tracked` one, whose error bound is then carried along.
    columns
        A, shape (..., n, k), in the dtype of the factor, or in bfloat16/float16 beside a float32 factor.
    decay, weight
        ρ and w, >= 0: numbers, or tensors of batch shape. For an exponential average ρ and 1 − ρ, with the
        normalisation of the data (such as 1/√k) inside A.
    rank
        Rank of the result, a number or a `brandla.Rank` rule: at most min(n, r + k), by default the old rank r.

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
    Two projection passes, or one on a CPU where it is as good, keep ‖UᵀU − I‖₂ at a small multiple of ε over any
    number of updates, on rank-deficient data too: columns inside the span of U, or repeated, add no basis vector. The
    result never exceeds the matrix it stands for (0 ⪯ M̂ ⪯ M, to rounding). The eigendecomposition waits for the
    device; `brandla.subspace_update` does not. U and A may be DTensors sharded on their rows: ``docs/sharded.md``.

    References
    ----------
    M. Brand, "Fast low-rank modifications of the thin singular value decomposition", Linear Algebra Appl. 415 (2006).
    Derivation: ``docs/brand.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> old = brandla.LowRankEigh.zeros(100, rank=4, dtype=torch.float64)
    >>> new = brandla.eigh_update(old, torch.eye(100, 6, dtype=torch.float64), decay=0.9, weight=0.5)
    >>> new.eigenvalues
    tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    return eigh_step(check_eigh_update("eigh_update", eigh, columns, decay, weight, rank)).as_new()


@overload
def eigh_update_(
    eigh: LowRankEigh, columns: Tensor, *, decay: float | Tensor = ..., weight: float | Tensor = ..., tol: float = ...
) -> LowRankEigh: ...


@overload
def eigh_update_(
    eigh: Tracked[LowRankEigh],
    columns: Tensor,
    *,
    decay: float | Tensor = ...,
    weight: float | Tensor = ...,
    tol: float = ...,
) -> Tracked[LowRankEigh]: ...


@ranged("n,r", "n,k")
def eigh_update_(
    eigh: LowRankEigh | Tracked[LowRankEigh],
    columns: Tensor,
    *,
    decay: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    tol: float = 0.0,
) -> LowRankEigh | Tracked[LowRankEigh]:
    """`eigh_update` at the old rank, written over the tensors of ``eigh``.

    Needs no second basis: the extra memory is that of the columns, and of small matrices.

    Parameters
    ----------
    eigh, columns, decay, weight
        As for `eigh_update`; ``columns`` must not share memory with ``eigh``.
    tol
        As in `brandla.Rank`: eigenvalues up to ``tol`` times the largest become 0, with zero vectors.

    Returns
    -------
    LowRankEigh or Tracked
        ``eigh`` itself.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `eigh_update`, and for tensors of ``eigh`` that are expanded and arguments that require grad, before anything
        is overwritten.
    """
    function = "eigh_update_"
    update = check_eigh_update(function, eigh, columns, decay, weight, None)
    update = check_in_place(function, "eigh.eigenvectors", "eigh.eigenvalues", update, tol)
    return eigh_step(update).in_place(eigh)


def check_eigh_update(
    function: str,
    eigh: LowRankEigh | Tracked[LowRankEigh],
    columns: Tensor,
    decay: float | Tensor,
    weight: float | Tensor,
    rank: int | Rank | None,
) -> Update:
    """Check the arguments of `eigh_update`."""
    _check.eigh(function, "eigh", eigh.lowrank if isinstance(eigh, Tracked) else eigh)
    return check_update(function, "eigh.eigenvectors", "eigh.eigenvalues", eigh, columns, decay, weight, rank)


def eigh_step(update: Update) -> Step[LowRankEigh]:
    """Compute `eigh_update`, up to the rotation of U."""
    if update.adds_nothing:
        return decay_step(LowRankEigh, update)
    values, vectors, rank, bound = update.old_values, update.basis, update.rank, update.decayed_bound
    expansion = expand(values, vectors, update.columns, update.decay, update.weight, update.rows)
    spectrum, rotation = safe_eigh(expansion.core, values.dtype, keep=rank)
    kept = spectrum[..., :rank]
    alive = above(kept, update.tol)
    rotation = polish(rotation * alive[..., None, :])
    if bound is not None:
        # The largest value left out: the first under the tolerance, or the first beyond the rank. 0 · NaN is NaN.
        dropped = torch.where(alive, 0 * kept, kept)
        dropped = torch.cat([dropped, spectrum[..., rank:]], dim=-1)
        bound = bound + (dropped.amax(-1) if dropped.shape[-1] else 0)
    return Step(LowRankEigh, without_denormals(kept * alive), vectors, (expansion, rotation), bound, update.rows)


@ranged("m,r,n", "m,k", "n,k")
def svd_update(
    svd: LowRankSVD, left: Tensor, right: Tensor, *, decay: float | Tensor = 1.0, rank: int | Rank | None = None
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
        Rank of the result, a number or a `brandla.Rank` rule: at most min(m, n, r + k), by default the old rank r.

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
    Columns of ``left`` and ``right`` are to have lengths from tiny/ε on in float32, from √(tiny/ε) to √max in float64:
    shorter ones count as zero, longer ones give NaN. U and ``left`` may be DTensors sharded on their rows, and so may
    the transpose of Vh and ``right``: ``docs/sharded.md``.

    References
    ----------
    M. Brand, Linear Algebra Appl. 415 (2006). Derivation: ``docs/brand.md``.
    """
    function = "svd_update"
    _check.svd(function, "svd", svd)
    left_vectors, values, right_vectors = svd.U, svd.S, svd.Vh.mT
    left_rows = rows_of(function, "svd.U", left_vectors, values)
    right_rows = rows_of(function, "svd.Vh.mT", right_vectors, values)
    left_rows.admit(function, "left", left)
    right_rows.admit(function, "right", right)
    left = _check.columns(function, "left", left, "svd.U", left_vectors)
    right = _check.columns(function, "right", right, "svd.Vh.mT", right_vectors)
    if left.shape[-1] != right.shape[-1]:
        _check.fail_value(
            function,
            f"left and right must have the same number k of columns; got {left.shape[-1]} and {right.shape[-1]}",
        )
    small = left_rows if right_rows is WHOLE else right_rows
    decay = _check.scalar(function, "decay", small.small(function, "decay", decay), "svd.U", left_vectors)
    m, n, r, k = left_vectors.shape[-2], right_vectors.shape[-2], left_vectors.shape[-1], left.shape[-1]
    most = min(m, n, r + k)
    tol = rank.tol if isinstance(rank, Rank) else 0.0
    because = f"min(m, n, r + k) with m = {m}, n = {n}, r = {r}, k = {k}"
    rank = _check.rank(function, most_of(rank), r, most, because)
    values = small.small(function, "svd.S", values)
    left_vectors, left = left_rows.local(function, "svd.U", left_vectors), left_rows.local(function, "left", left)
    right_vectors = right_rows.local(function, "svd.Vh.mT", right_vectors)
    right = right_rows.local(function, "right", right)
    left_parts, right_parts = split(left_vectors, left, left_rows), split(right_vectors, right, right_rows)
    core = _stacked(left_parts) @ _stacked(right_parts).mT
    core[..., :r, :r] += torch.diag_embed(_decayed(decay, values)).double()
    rotation, spectrum, right_rotation = _truncated_svd(core, rank, tol, values.dtype)
    return LowRankSVD(
        left_rows.tall_result(left_parts.rotate(left_vectors, rotation)),
        small.small_result(spectrum),
        right_rows.tall_result(right_parts.rotate(right_vectors, right_rotation)).mT,
    )


@overload
def svd_append(
    svd: LowRankSVD, columns: Tensor, *, decay: float | Tensor = ..., rank: int | Rank | None = ...
) -> LowRankSVD: ...


@overload
def svd_append(
    svd: Centred, columns: Tensor, *, decay: float | Tensor = ..., rank: int | Rank | None = ...
) -> Centred: ...


@ranged("m,r,n", "m,k")
def svd_append(
    svd: LowRankSVD | Centred, columns: Tensor, *, decay: float | Tensor = 1.0, rank: int | Rank | None = None
) -> LowRankSVD | Centred:
    """Best rank-``rank`` truncation of ``[decay * U diag(S) Vh, columns]``: streaming PCA and LSI.

    Equivalent to the leading triplets of ``torch.linalg.svd(torch.cat([decay * svd.dense(), columns], dim=-1))``, in
    O(m (r + k)² + n r²) + O((r + k)³) operations.

    Parameters
    ----------
    svd
        U (..., m, r), S (..., r), Vh (..., r, n). ``LowRankSVD.zeros(m, 0, rank)`` starts a stream. Or a
        `Centred` one, started by `centre`: the decomposition is then of the columns less their running
        mean, as in principal component analysis.
    columns
        A, shape (..., m, k): appended to the right.
    decay
        ρ >= 0: a number, or a tensor of batch shape; below 1 it forgets old columns.
    rank
        Rank of the result, a number or a `brandla.Rank` rule: at most min(m, r + k), by default the old rank r.

    Returns
    -------
    LowRankSVD or Centred
        As ``svd`` was, with Vh of shape (..., rank, n + k), or none when centred. New tensors: nothing is
        modified or shared.

    Raises
    ------
    ValueError, TypeError
        For shapes, values, dtypes and devices that do not fit, before anything is computed.

    Notes
    -----
    Vh grows by k columns a call. Where only U and S are wanted, `brandla.eigh_update` on the same columns keeps
    U and S² in constant memory, and a centred stream keeps U and S. A rank above the number of columns seen leaves zero
    triplets. Lengths of columns as for `svd_update`. U and A may be DTensors sharded on their rows:
    ``docs/sharded.md``.

    References
    ----------
    M. Brand, "Incremental singular value decomposition of uncertain data with missing values", ECCV 2002.
    Derivation: ``docs/brand.md``.
    """
    if isinstance(svd, Centred):
        return _append_centred(svd, columns, decay, rank)
    return _append("svd_append", svd, columns, decay, rank)


def _append(
    function: str, svd: LowRankSVD, columns: Tensor, decay: float | Tensor, rank: int | Rank | None
) -> LowRankSVD:
    append = _check_append(function, svd, columns, decay, rank)
    return append.as_given(_append_here(append))


class _Append(NamedTuple):
    """Arguments of `svd_append` that fit together, as far as they are here."""

    svd: LowRankSVD
    columns: Tensor
    decay: float | Tensor
    rank: int
    tol: float
    rows: Rows  # which rows of U and of the columns are here

    def as_given(self, svd: LowRankSVD) -> LowRankSVD:
        """Return a result of the kind of the old factor."""
        rows = self.rows
        return LowRankSVD(rows.tall_result(svd.U), rows.small_result(svd.S), rows.small_result(svd.Vh))


def _check_append(
    function: str, svd: LowRankSVD, columns: Tensor, decay: float | Tensor, rank: int | Rank | None
) -> _Append:
    _check.svd(function, "svd", svd)
    rows = rows_of(function, "svd.U", svd.U, svd.S)
    rows.admit(function, "columns", columns)
    columns = _check.columns(function, "columns", columns, "svd.U", svd.U)
    decay = _check.scalar(function, "decay", rows.small(function, "decay", decay), "svd.U", svd.U)
    m, r = svd.U.shape[-2:]
    k = columns.shape[-1]
    because = f"min(m, r + k) with m = {m}, r = {r}, k = {k}"
    most = _check.rank(function, most_of(rank), r, min(m, r + k), because)
    local = LowRankSVD(
        rows.local(function, "svd.U", svd.U),
        rows.small(function, "svd.S", svd.S),
        rows.small(function, "svd.Vh", svd.Vh),
    )
    return _Append(local, rows.local(function, "columns", columns), decay, most, tolerance_of(rank), rows)


def _append_here(append: _Append) -> LowRankSVD:
    left_vectors, values, right_rows = append.svd
    r = values.shape[-1]
    parts, core = _appended_core(append)
    rotation, spectrum, right_rotation = _truncated_svd(core, append.rank, append.tol, values.dtype)
    right_rotation = right_rotation.to(values.dtype)
    right = torch.cat([right_rows.mT @ right_rotation[..., :r, :], right_rotation[..., r:, :]], dim=-2)
    return LowRankSVD(parts.rotate(left_vectors, rotation), spectrum, right.mT)


def _appended_core(append: _Append) -> tuple[Split, Tensor]:
    """Return the split of the columns, and [ρ U diag(S), A] in the basis [U Q]."""
    svd, columns = append.svd, append.columns
    parts = split(svd.U, columns, append.rows)
    old = torch.diag_embed(_decayed(append.decay, svd.S)).double()
    old = torch.cat([old, old.new_zeros(*old.shape[:-2], columns.shape[-1], svd.S.shape[-1])], dim=-2)
    return parts, torch.cat([old, _stacked(parts)], dim=-1)


def _append_centred(state: Centred, columns: Tensor, decay: float | Tensor, rank: int | Rank | None) -> Centred:
    """Append the batch about its own mean, and the distance between the means in the direction this leaves free."""
    function = "svd_append"
    svd, mean, weight = state
    _check.svd(function, "svd.svd", svd)
    _check.centre(function, svd.U, mean, weight)
    append = _check_append(function, svd, columns, decay, rank)
    columns, rows = append.columns, append.rows
    rows.admit(function, "svd.mean", mean)
    mean, weight = rows.local(function, "svd.mean", mean, -1), rows.small(function, "svd.weight", weight)
    k = columns.shape[-1]
    old = weight * append.decay**2
    total = old + k
    share = torch.where(total > 0, k / total, 0.0)
    batch_mean = columns.mean(-1) if k else mean
    # Σ (x − μ)(x − μ)ᵀ over both parts = both parts about their own means + s sᵀ, s = √(old·k/total) (μ_old − μ_batch).
    # The batch about its mean, B, has B 1 = 0, so (B + s 1ᵀ/√k)(B + s 1ᵀ/√k)ᵀ = B Bᵀ + s sᵀ: no column is added.
    shift = (mean - batch_mean) * (old * share / max(k, 1)).sqrt()[..., None]
    centred = columns - (batch_mean - shift)[..., None]
    updated = _append_left(append._replace(columns=centred))
    mean = mean + (batch_mean - mean) * share[..., None]
    return Centred(append.as_given(updated), rows.tall_result(mean, -1), rows.small_result(total))


def _append_left(append: _Append) -> LowRankSVD:
    """`_append_here` without Vh. In float32 U and S come from K Kᵀ, whose rounding in float64 is below that of S."""
    svd, rank, tol = append.svd, append.rank, append.tol
    if svd.S.dtype == torch.float64:
        updated = _append_here(append)
        return LowRankSVD(updated.U, updated.S, updated.Vh[..., :0])
    parts, core = _appended_core(append)
    squares, rotation = safe_eigh(core @ core.mT, keep=rank)
    kept = squares[..., :rank].sqrt()
    alive = above(kept, tol) & (kept > 4 * torch.finfo(svd.S.dtype).eps * kept[..., :1])
    values = without_denormals((kept * alive).to(svd.S.dtype))
    vectors = parts.rotate(svd.U, polish(rotation * alive[..., None, :]))
    return LowRankSVD(vectors, values, svd.Vh.new_zeros(*svd.Vh.shape[:-2], rank, 0))


def _truncated_svd(core: Tensor, rank: int, tol: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rotation, spectrum, right_rotation = safe_svd(core, dtype)
    kept = spectrum[..., :rank]
    alive = above(kept, tol)
    return (
        rotation[..., :rank] * alive[..., None, :],
        without_denormals((kept * alive).to(dtype)),
        right_rotation[..., :rank] * alive[..., None, :],
    )


def _stacked(parts: Split) -> Tensor:
    return torch.cat([parts.coefficients, parts.triangle], dim=-2)


def _decayed(decay: float | Tensor, values: Tensor) -> Tensor:
    return values * (decay[..., None] if isinstance(decay, Tensor) else decay)
