"""Brand's updates in an orthonormal form: eigen- and singular value decompositions that keep up with a stream."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import WHOLE, Rows, rows_of
from brandla._small import above, leading, orthonormal_in, safe_eigh, safe_svd, signs_of, unit_scaled, unresolved
from brandla.lowrank import Centred, LowRankEigh, LowRankSVD, Rank, Tracked, less, most_of, over, tolerance_of
from brandla.orthonormal import polish
from brandla.root import Update, Updated, check_update, is_sparse
from brandla_kernels import gram, reads_are_free, without_denormals

Eigh = TypeVar("Eigh", LowRankEigh, Tracked[LowRankEigh])
SVD = TypeVar("SVD", LowRankSVD, Centred)


@ranged("n,r", "n,k")
def eigh_update(
    eigh: Eigh,
    columns: Tensor,
    *,
    decay: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    rank: int | Rank | None = None,
) -> Eigh:
    """Best rank-``rank`` truncation of ``decay * U diag(d) Uᵀ + weight * A Aᵀ``.

    Equivalent to the leading eigenpairs of ``torch.linalg.eigh(decay * eigh.dense() + weight * A @ A.mT)``, in
    O(n (r + k)²) + O((r + k)³) operations in place of O(n³), and with no n × n matrix.

    Parameters
    ----------
    eigh
        d (..., r) and U (..., n, r), or a `Tracked` one, whose error bound and trace are then carried along.
    columns
        A, shape (..., n, k), in the dtype of the factor, or in bfloat16/float16 beside a float32 factor. Or a sparse
        tensor (n, k), COO or CSR, which is only multiplied with.
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
    The update of `brandla.root_update` with F = U √d, scaled to unit columns and polished: U is made orthonormal anew,
    so nothing drifts. ‖UᵀU − I‖₂ is a few ε after a polish. On a CPU the polish is left out while an estimate of that
    norm is at most 20 ε. Eigenvalues up to 8 ε of the largest, or √(r + k) ε where that is more, are rounding: they
    become 0, with zero columns. The result never exceeds the matrix it stands for (0 ⪯ M̂ ⪯ M, to rounding). The
    eigendecomposition waits for the device; `brandla.root_update` with ``compress="cholesky"`` does not. U and A may be
    DTensors sharded on their rows: ``docs/sharded.md``. The derivative by A is right from zeros too, and of columns
    that depend on one another; by eigenvalues that are 0 it is NaN.

    References
    ----------
    M. Brand, "Fast low-rank modifications of the thin singular value decomposition", Linear Algebra Appl. 415 (2006).
    Derivation: ``docs/updates.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> old = brandla.LowRankEigh.zeros(100, rank=4, dtype=torch.float64)
    >>> new = brandla.eigh_update(old, torch.eye(100, 6, dtype=torch.float64), decay=0.9, weight=0.5)
    >>> new.eigenvalues
    tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    updated: Eigh = eigh_step(check_eigh_update("eigh_update", eigh, columns, decay, weight, rank)).as_new()
    return updated


@ranged("n,r", "n,k")
def eigh_update_(
    eigh: Eigh, columns: Tensor, *, decay: float | Tensor = 1.0, weight: float | Tensor = 1.0, tol: float = 0.0
) -> Eigh:
    """`eigh_update` at the old rank, written over the tensors of ``eigh``, which it returns.

    Needs no second basis. ``columns`` must not share memory with ``eigh``. ``tol`` is that of a `brandla.Rank`. Raises
    as `eigh_update` does, and for tensors of ``eigh`` that are expanded and arguments that require grad, before
    anything is overwritten.
    """
    update = check_eigh_update("eigh_update_", eigh, columns, decay, weight, None)
    return eigh_step(update.overwriting(tol)).over(eigh)


def check_eigh_update(
    function: str,
    eigh: Any,
    columns: Tensor,
    decay: float | Tensor,
    weight: float | Tensor,
    rank: int | Rank | None,
) -> Update:
    """Check the arguments of `eigh_update`."""
    _check.eigh(function, "eigh", eigh.lowrank if isinstance(eigh, Tracked) else eigh)
    return check_update(function, LowRankEigh, eigh, columns, decay, weight, rank)


def eigh_step(update: Update) -> Updated:
    """Compute `eigh_update` from checked arguments: the root's step from F = U √d, to unit columns and polished."""
    lengths = update.small.sqrt()
    core = update.core(torch.diag_embed(update.small), lengths)
    tol = max(update.tol, unresolved(update.dtype, core.shape[-1]))
    values, rotation, left_out = leading(core, update.rank, update.dtype, tol)
    # B = [√ρ U √d, √w A] is rotated by V Σ⁻¹, so that the product of an old vector with the new one in its place is a
    # positive multiple of an entry on the diagonal of V.
    rotation = unit_scaled(rotation, values) * signs_of(rotation.diagonal(dim1=-2, dim2=-1))[..., None, :]
    if reads_are_free(core):
        # It spares most polishes; where they cannot be spared it would be work for nothing.
        rotation = orthonormal_in(core, rotation)
    vectors = update.rotated(*update.scaled(rotation, lengths))
    vectors = polish(vectors, update.rows, in_place=update.in_place)
    return update.result(values, vectors, left_out, update.added(core, left_out))


@ranged("n,r", "n,k")
def eigh_downdate(eigh: LowRankEigh, columns: Tensor, *, weight: float | Tensor = 1.0) -> LowRankEigh:
    """Take columns back: ``U diag(d) Uᵀ - weight * A Aᵀ`` within the span of U, with what would be negative as 0.

    The inverse of `eigh_update` where that truncated nothing; with it, a sliding window. 2nrk + 2nr² flops and O(r³).
    Raises as `eigh_update` does.

    Parameters
    ----------
    eigh
        d (..., r) and U (..., n, r).
    columns
        A, shape (..., n, k): usually columns that were added before, times what ``decay`` has left of them.
    weight
        w >= 0: a number, or a tensor of batch shape.

    Returns
    -------
    LowRankEigh
        Of the same rank. New tensors: nothing is modified or shared.

    Notes
    -----
    The part of A outside the span of U was truncated before, so there is nothing to take it from: it is left out, and
    U spans no more than before. Truncation errors in the span do not grow in the Frobenius norm, but what was truncated
    does not come back either (``docs/updates.md``). Rounding is relative to what was there and to what is taken: values
    up to 8 ε·(d₁ + w‖UᵀA‖_F²) become 0, with zero columns. The eigendecomposition waits for the device. U and A may be
    DTensors sharded on their rows, and A a sparse tensor (n, k).

    Examples
    --------
    >>> import torch, brandla
    >>> window = brandla.LowRankEigh.zeros(100, rank=8, dtype=torch.float64)
    >>> first, second = torch.randn(2, 100, 4, dtype=torch.float64)
    >>> window = brandla.eigh_update(brandla.eigh_update(window, first), second)
    >>> torch.dist(brandla.eigh_downdate(window, first).dense(), second @ second.mT) < 1e-10
    tensor(True)
    """
    _check.eigh("eigh_downdate", "eigh", eigh)
    given = check_update("eigh_downdate", LowRankEigh, eigh, columns, 1.0, weight, None)
    cross = given.rows.total(given.coefficients())
    taken = cross @ cross.mT * over(given.weight, 2)
    # Values of a semi-definite matrix, less this, are those of diag(d) − w CCᵀ, which may be negative.
    shift = taken.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    values, rotation = safe_eigh(torch.diag_embed(given.poisoned(given.small) + shift) - taken)
    values = (values - shift).to(given.dtype)
    lost = values <= unresolved(given.dtype, values.shape[-1]) * (given.small[..., :1] + shift)
    values, rotation = torch.where(lost, 0, values), torch.where(lost[..., None, :], 0, rotation)
    rotation = rotation * signs_of(rotation.diagonal(dim1=-2, dim2=-1))[..., None, :]
    vectors = polish(given.tall @ rotation.to(given.dtype), given.rows)
    updated: LowRankEigh = given.result(values, vectors, values, None).as_new()
    return updated


@ranged("m,r,n", "m,k", "n,k")
def svd_update(
    svd: LowRankSVD, left: Tensor, right: Tensor, *, decay: float | Tensor = 1.0, rank: int | Rank | None = None
) -> LowRankSVD:
    """Best rank-``rank`` truncation of ``decay * U diag(S) Vh + left @ right.mT``.

    Equivalent to the leading triplets of ``torch.linalg.svd(decay * svd.dense() + left @ right.mT)``, in
    O((m + n)(r + k)²) + O((r + k)³) operations and with no m × n matrix. Raises as `svd_append` does.

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

    Notes
    -----
    Singular values below 4·ε relative to the largest are rounding noise: they come back as 0 with zero vectors.
    In float32 columns of ``left`` and ``right`` shorter than tiny/ε count as zero; values that leave the range of the
    dtype give NaN. The derivative is right where the values kept are distinct and [U diag(S), left] and [V, right] have
    full rank: elsewhere, as at a start from zeros, it may be NaN or wrong. U and ``left`` may be DTensors sharded on
    their rows, and so may the transpose of Vh and ``right``: ``docs/sharded.md``.

    References
    ----------
    M. Brand, Linear Algebra Appl. 415 (2006). Derivation: ``docs/updates.md``.
    """
    function = "svd_update"
    _check.svd(function, "svd", svd)
    left_vectors, values, right_vectors = svd.U, svd.S, svd.Vh.mT
    left_rows = rows_of(function, "svd.U", left_vectors, values)
    right_rows = rows_of(function, "svd.Vh.mT", right_vectors, values)
    left_rows.admit(function, "left", left)
    right_rows.admit(function, "right", right)
    left, right = _in_full(left), _in_full(right)
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
    because = f"min(m, n, r + k) with m = {m}, n = {n}, r = {r}, k = {k}"
    tol, rank = tolerance_of(rank), _check.rank(function, most_of(rank), r, most, because)
    values = small.small(function, "svd.S", values)
    left_vectors, left = left_rows.local(function, "svd.U", left_vectors), left_rows.local(function, "left", left)
    right_vectors = right_rows.local(function, "svd.Vh.mT", right_vectors)
    right = right_rows.local(function, "right", right)
    left_panel = torch.cat([left_vectors * (values * over(decay))[..., None, :], left], dim=-1)
    left_side = _factored(left_panel, left_rows)
    right_side = _factored(torch.cat([right_vectors, right], dim=-1), right_rows)
    core = left_side.triangle @ right_side.triangle.mT
    rotation, spectrum, right_rotation = _truncated_svd(core, rank, tol, values.dtype)
    # The left panel is Q T, with the old vectors in front: products of old vectors with new ones of the same place.
    turned = signs_of((left_side.triangle[..., :rank] * rotation).sum(-2))[..., None, :]
    rotation, right_rotation = rotation * turned, right_rotation * turned
    return LowRankSVD(
        left_rows.tall_result(left_side.basis(rotation)),
        small.small_result(spectrum),
        right_rows.tall_result(right_side.basis(right_rotation)).mT,
    )


@ranged("m,r,n", "m,k")
def svd_append(svd: SVD, columns: Tensor, *, decay: float | Tensor = 1.0, rank: int | Rank | None = None) -> SVD:
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
    triplets. Values below the normal numbers of the dtype count as zero, and values that leave its range give NaN. The
    derivative is right where the values kept are distinct and [U diag(S), A] has full rank, as for `svd_update`. U and
    A may be DTensors sharded on their rows: ``docs/sharded.md``.

    References
    ----------
    M. Brand, "Incremental singular value decomposition of uncertain data with missing values", ECCV 2002.
    Derivation: ``docs/updates.md``.
    """
    if isinstance(svd, Centred):
        return _append_centred(svd, columns, decay, rank)
    append = _check_append(svd, columns, decay, rank)
    left, values, rotation = _leading_triplets(append)
    r = append.svd.S.shape[-1]
    right = torch.cat([append.svd.Vh.mT @ rotation[..., :r, :], rotation[..., r:, :]], dim=-2)
    return append.result(left, values, right.mT)


class _Append(NamedTuple):
    """Arguments of `svd_append` that fit together, as far as they are here."""

    svd: LowRankSVD
    columns: Tensor
    decay: float | Tensor
    rank: int
    tol: float
    rows: Rows  # which rows of U and of the columns are here

    def result(self, left: Tensor, values: Tensor, right: Tensor) -> LowRankSVD:
        """Return a decomposition of the kind of the old one."""
        rows = self.rows
        return LowRankSVD(rows.tall_result(left), rows.small_result(values), rows.small_result(right))


def _check_append(svd: LowRankSVD, columns: Tensor, decay: float | Tensor, rank: int | Rank | None) -> _Append:
    function = "svd_append"
    _check.svd(function, "svd", svd)
    rows = rows_of(function, "svd.U", svd.U, svd.S)
    rows.admit(function, "columns", columns)
    columns = _check.columns(function, "columns", _in_full(columns), "svd.U", svd.U)
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


def _leading_triplets(append: _Append) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of the panel B = [ρ U diag(S), A]: those of its QR's R in float64, else of BᵀB = V S² Vᵀ.

    A Gram matrix in float64 resolves all that float32 data holds.
    """
    svd, dtype = append.svd, append.svd.S.dtype
    panel = torch.cat([svd.U * (svd.S * over(append.decay))[..., None, :], append.columns], dim=-1)
    if dtype == torch.float64:
        side = _factored(panel, append.rows)
        rotation, spectrum, right = _truncated_svd(side.triangle, append.rank, append.tol, dtype)
        turned = signs_of(right.diagonal(dim1=-2, dim2=-1))[..., None, :]
        return side.basis(rotation * turned), spectrum, right * turned
    noise = max(append.tol, 4 * torch.finfo(dtype).eps) ** 2
    squares, right, _ = leading(append.rows.total(gram(panel)), append.rank, torch.float64, noise)
    # The inverse of a value below the normal numbers is no number of this dtype. A comparison with NaN is false.
    vanished = squares < torch.finfo(dtype).tiny ** 2
    squares, right = torch.where(vanished, 0, squares), torch.where(vanished[..., None, :], 0, right)
    right = right * signs_of(right.diagonal(dim1=-2, dim2=-1))[..., None, :]
    left = polish(panel @ unit_scaled(right, squares).to(dtype), append.rows)
    return left, without_denormals(squares.sqrt().to(dtype)), right.to(dtype)


class _Factored(NamedTuple):
    """A panel P = Q T with Q = P′ X orthonormal, or zero columns: Q itself is not formed."""

    panel: Tensor  # P′       [..., n, p]
    transform: Tensor | None  # X      [..., p, q], float64; None stands for I
    triangle: Tensor  # T       [..., q, p], float64
    rows: Rows

    def basis(self, rotation: Tensor) -> Tensor:
        """Return Q W for W (..., q, s)."""
        if self.transform is None:
            return self.panel @ rotation
        panel: Tensor = self.panel @ (self.transform @ rotation.double()).to(self.panel.dtype)
        polished: Tensor = polish(panel, self.rows)
        return polished


def _factored(panel: Tensor, rows: Rows) -> _Factored:
    """Factor a panel: by QR in float64, else by D PᵀP D = V Λ Vᵀ in float64 with unit columns P D."""
    if panel.dtype == torch.float64:
        basis, triangle = _qr(panel, rows)
        return _Factored(basis, None, triangle, rows)
    inner = rows.total(gram(panel))
    lengths = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    shortest = torch.finfo(panel.dtype).tiny / torch.finfo(panel.dtype).eps
    unit = torch.where(lengths <= shortest, 0, 1 / torch.where(lengths <= shortest, 1, lengths))
    noise = (4 * torch.finfo(panel.dtype).eps) ** 2
    values, vectors, _ = leading(inner * unit[..., :, None] * unit[..., None, :], inner.shape[-1], inner.dtype, noise)
    transform = unit[..., :, None] * unit_scaled(vectors, values)
    return _Factored(panel, transform, values.sqrt()[..., :, None] * vectors.mT * lengths[..., None, :], rows)


def _qr(panel: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return Q and R of a panel (n, p); of a sharded one from the QR of all processes' R."""
    basis, triangle = torch.linalg.qr(panel)
    if rows is WHOLE:
        return basis, triangle
    inner, triangle = torch.linalg.qr(rows.stacked(triangle))
    return basis @ rows.own(inner, panel.shape[-1]), triangle


def _append_centred(state: Centred, columns: Tensor, decay: float | Tensor, rank: int | Rank | None) -> Centred:
    """Append the batch about its own mean, and the distance between the means in the direction this leaves free."""
    function = "svd_append"
    svd, mean, weight, scatter = state
    _check.centred(function, "svd", state)
    append = _check_append(svd, columns, decay, rank)
    columns, rows = append.columns, append.rows
    rows.admit(function, "svd.mean", mean)
    mean = rows.local(function, "svd.mean", mean, -1)
    weight, scatter = rows.small(function, "svd.weight", weight), rows.small(function, "svd.scatter", scatter)
    k = columns.shape[-1]
    old = weight * append.decay**2
    total = old + k
    share = torch.where(total > 0, k / total, 0.0)
    batch_mean = columns.mean(-1, dtype=torch.float64) if k else mean
    # Σ (x − μ)(x − μ)ᵀ over both parts = both parts about their own means + s sᵀ, s = √(old·k/total) (μ_old − μ_batch).
    # The batch about its mean, B, has B 1 = 0, so (B + s 1ᵀ/√k)(B + s 1ᵀ/√k)ᵀ = B Bᵀ + s sᵀ: no column is added.
    shift = (mean - batch_mean) * (old * share / max(k, 1)).sqrt()[..., None]
    centred = less(columns, batch_mean - shift)
    left, values, _ = _leading_triplets(append._replace(columns=centred))
    added = rows.total(torch.linalg.vector_norm(centred, dim=(-2, -1), dtype=torch.float64).square())
    # What is not finite in one entry of the mean reaches all of it.
    mean = mean + (batch_mean - mean) * share[..., None] + 0 * added[..., None]
    numbers = map(rows.small_result, (total + 0 * added, scatter * append.decay**2 + added))
    empty = values.new_zeros(*values.shape, 0)
    return Centred(append.result(left, values, empty), rows.tall_result(mean, -1), *numbers)


def _truncated_svd(core: Tensor, rank: int, tol: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rotation, spectrum, right_rotation = safe_svd(core, dtype)
    kept = spectrum[..., :rank]
    alive = above(kept, tol)
    return (
        rotation[..., :rank] * alive[..., None, :],
        without_denormals((kept * alive).to(dtype)),
        right_rotation[..., :rank] * alive[..., None, :],
    )


def _in_full(columns: Tensor) -> Tensor:
    """Return sparse columns as dense ones: the panel would hold them as such."""
    return columns.to_dense() if is_sparse(columns) else columns
