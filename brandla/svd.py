"""Updates of a singular value decomposition: add a low-rank matrix, append columns, merge centred streams."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import UNSHARDED, Sharding, sharding_of
from brandla._small import leading_eigh, safe_svd, signs_of
from brandla.lowrank import Centred, LowRankSVD, Number, Rank, add_dims, max_and_tol, subtract_mean
from brandla.orthonormal import polish
from brandla.root import is_sparse
from brandla_kernels import gram, without_denormals

SVD = TypeVar("SVD", LowRankSVD, Centred)


@ranged("m,r,n", "m,k", "n,k")
def svd_update(
    svd: LowRankSVD, left: Tensor, right: Tensor, *, decay: Number = 1.0, rank: int | Rank | None = None
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
    decay, rank
        ρ >= 0, a number or a tensor of batch shape, and the rank of the result, a number or a `brandla.Rank` rule: at
        most min(m, n, r + k), by default the old rank r.

    Notes
    -----
    Singular values below 4·ε relative to the largest are rounding: they become 0, with zero vectors. In float32,
    columns shorter than tiny/ε count as zero. Values out of range of the dtype give NaN. The derivative is right if the
    kept values are distinct and [U diag(S), left] and [V, right] have full rank; after a start from zeros they do not.
    Each side may be sharded on its rows: ``docs/sharded.md``. Source: M. Brand, Linear Algebra Appl. 415 (2006);
    derivation: ``docs/updates.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> svd = brandla.LowRankSVD.zeros(6, 4, rank=2)
    >>> brandla.svd_update(svd, 3 * torch.eye(6, 2), torch.eye(4, 2)).S
    tensor([3., 3.])
    """
    function = "svd_update"
    _check.svd(function, "svd", svd)
    left_sharding, left_vectors, left = _local_side(function, ("svd.U", "left"), svd.U, left, svd.S)
    right_sharding, right_vectors, right = _local_side(function, ("svd.Vh.mT", "right"), svd.Vh.mT, right, svd.S)
    if left.shape[-1] != right.shape[-1]:
        rule = "left and right must have the same number k of columns"
        _check.fail_value(function, f"{rule}; got {left.shape[-1]} and {right.shape[-1]}")
    sharding = left_sharding if right_sharding is UNSHARDED else right_sharding
    decay = _check.scalar(function, "decay", sharding.local_small(function, "decay", decay), "svd.U", svd.U)
    (m, r), n, k = svd.U.shape[-2:], svd.Vh.shape[-1], left.shape[-1]
    requested, tol = max_and_tol(rank)
    because = f"min(m, n, r + k) with m = {m}, n = {n}, r = {r}, k = {k}"
    most = _check.rank(function, requested, r, min(m, n, r + k), because)
    values = sharding.local_small(function, "svd.S", svd.S)
    left_panel = torch.cat([left_vectors * (values * add_dims(decay))[..., None, :], left], dim=-1)
    times_left, left_triangle = _panel_factors(left_panel, left_sharding)
    times_right, right_triangle = _panel_factors(torch.cat([right_vectors, right], dim=-1), right_sharding)
    rotation, spectrum, right_rotation = _truncated_svd(left_triangle @ right_triangle.mT, most, tol, values.dtype)
    # The left panel Q T starts with the old vectors, so these sums are products of old and new vectors of one index.
    signs = signs_of((left_triangle[..., :most] * rotation).sum(-2))[..., None, :]
    return LowRankSVD(
        left_sharding.tall_result(times_left(rotation * signs)),
        sharding.small_result(spectrum),
        right_sharding.tall_result(times_right(right_rotation * signs)).mT,
    )


@ranged("m,r,n", "m,k")
def svd_append(svd: SVD, columns: Tensor, *, decay: Number = 1.0, rank: int | Rank | None = None) -> SVD:
    """Best rank-``rank`` truncation of ``[decay * U diag(S) Vh, columns]``: streaming PCA and LSI.

    Equivalent to the leading triplets of ``torch.linalg.svd(torch.cat([decay * svd.dense(), columns], dim=-1))``, in
    O(m (r + k)² + n r²) + O((r + k)³) operations. Returns the type of ``svd``, with Vh of shape (..., rank, n + k), or
    (..., rank, 0) if centred.

    Parameters
    ----------
    svd
        U (..., m, r), S (..., r), Vh (..., r, n). ``LowRankSVD.zeros(m, 0, rank)`` starts a stream. Or a `Centred`
        stream, started by `centre`: it decomposes the columns minus their running mean, as in principal component
        analysis.
    columns
        A, shape (..., m, k): appended to the right.
    decay, rank
        As in `svd_update`, with a rank of at most min(m, r + k). A decay below 1 forgets old columns.

    Notes
    -----
    Vh grows by k columns per call. If you want only U and S, `brandla.eigh_update` on the same columns keeps U and S²
    in constant memory, and a centred stream keeps U and S. If the rank exceeds the number of columns so far, surplus
    triplets are zero. Values below the normal numbers of the dtype count as zero. Derivatives and sharding are as in
    `svd_update`. Source: M. Brand, "Incremental singular value decomposition of uncertain data with missing values",
    ECCV 2002. Derivation: ``docs/updates.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> svd = brandla.LowRankSVD.zeros(6, 0, rank=2)
    >>> svd = brandla.svd_append(svd, 3 * torch.eye(6, 2))
    >>> svd.S, svd.shape
    (tensor([3., 3.]), torch.Size([6, 2]))
    """
    function = "svd_append"
    # mypy checks the body once for each type of argument.
    state: Any = svd
    is_centred = isinstance(state, Centred)
    check = _check.centred if is_centred else _check.svd
    check(function, "svd", state)
    factor: LowRankSVD = state.svd if is_centred else state
    sharding, vectors, columns = _local_side(function, ("svd.U", "columns"), factor.U, columns, factor.S)
    decay = _check.scalar(function, "decay", sharding.local_small(function, "decay", decay), "svd.U", factor.U)
    (m, r), k = factor.U.shape[-2:], columns.shape[-1]
    requested, tol = max_and_tol(rank)
    because = f"min(m, r + k) with m = {m}, r = {r}, k = {k}"
    most = _check.rank(function, requested, r, min(m, r + k), because)
    old, right = sharding.local_small(function, "svd.S", factor.S), sharding.local_small(function, "svd.Vh", factor.Vh)
    sums: tuple[Tensor, ...] = ()
    if is_centred:
        columns, sums = _recentred(state, columns, decay, sharding)
    panel = torch.cat([vectors * (old * add_dims(decay))[..., None, :], columns], dim=-1)
    left, values, rotation = _leading_triplets(panel, most, tol, sharding)
    right = rotation[..., :0, :] if sums else torch.cat([right.mT @ rotation[..., :r, :], rotation[..., r:, :]], dim=-2)
    joined = LowRankSVD(sharding.tall_result(left), sharding.small_result(values), sharding.small_result(right.mT))
    return cast(SVD, Centred(joined, *sums) if sums else joined)


@ranged("m,r,n", "m,r,n")
def merge(first: Centred, second: Centred, *, rank: int | Rank | None = None) -> Centred:
    """Join two centred streams: decompose the columns of both about their common mean.

    If nothing was truncated, this is equivalent to one stream of the columns of ``first`` and then of ``second``, in
    O(m (r₁ + r₂)²) operations.

    Both are `Centred` values of the same m, batch shape and dtype. ``rank`` is the rank of the result, a number or a
    `brandla.Rank` rule: at most min(m, r₁ + r₂ + 1), by default r₁. The columns U₂ diag(S₂) and
    √(N₁N₂/(N₁ + N₂)) (μ₂ − μ₁) are appended to the first. Source: D. Ross, J. Lim, R.-S. Lin, M.-H. Yang, "Incremental
    learning for robust visual tracking", Int. J. Comput. Vis. 77 (2008).

    Examples
    --------
    >>> import torch, brandla
    >>> start = brandla.centre(brandla.LowRankSVD.zeros(64, 0, rank=8))
    >>> first, second = (brandla.svd_append(start, torch.randn(64, 32)) for _ in range(2))
    >>> brandla.merge(first, second).weight
    tensor(64., dtype=torch.float64)
    """
    for name, state in (("first", first), ("second", second)):
        _check.centred("merge", name, state)
    (svd, mean, weight, scatter), (other, other_mean, other_weight, other_scatter) = first, second
    _check.columns("merge", "second.svd.U", other.U, "first.svd.U", svd.U)
    total = weight + other_weight
    share = torch.where(total > 0, other_weight / total, 0)
    shift = (other_mean - mean) * (weight * share).sqrt()[..., None]
    columns = torch.cat([other.U * other.S[..., None, :], shift.to(svd.dtype)[..., None]], dim=-1)
    joined = svd_append(svd, columns, rank=rank)
    return Centred(
        LowRankSVD(joined.U, joined.S, joined.Vh[..., :0]),
        mean + (other_mean - mean) * share[..., None],
        total,
        scatter + other_scatter + shift.square().sum(-1),
    )


def _local_side(
    function: str, names: tuple[str, str], vectors: Tensor, new: Tensor, values: Tensor
) -> tuple[Sharding, Tensor, Tensor]:
    """Check new columns against singular vectors, and return the local rows of both, after their `Rows`."""
    name, new_name = names
    sharding = sharding_of(function, name, vectors, values)
    sharding.check_kind(function, new_name, new)
    # The panel of vectors and columns is dense anyway.
    dense = new.to_dense() if is_sparse(new) else new
    new = _check.columns(function, new_name, dense, name, vectors)
    return sharding, sharding.local(function, name, vectors), sharding.local(function, new_name, new)


def _leading_triplets(panel: Tensor, rank: int, tol: float, sharding: Sharding) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of a panel: float64 by QR, float32 by a float64 Gram matrix, which resolves all its digits."""
    dtype = panel.dtype
    if dtype == torch.float64:
        times_basis, triangle = _panel_factors(panel, sharding)
        rotation, spectrum, right = _truncated_svd(triangle, rank, tol, dtype)
        signs = signs_of(right.diagonal(dim1=-2, dim2=-1))[..., None, :]
        return times_basis(rotation * signs), spectrum, right * signs
    noise = max(tol, 4 * torch.finfo(dtype).eps) ** 2
    squares, right = leading_eigh(sharding.total(gram(panel)), rank, torch.float64, noise)
    # The inverse of a value below the normal numbers may overflow this dtype. NaN stays, since it compares as false.
    vanished = squares < torch.finfo(dtype).tiny ** 2
    squares, right = torch.where(vanished, 0, squares), torch.where(vanished[..., None, :], 0, right)
    right = right * signs_of(right.diagonal(dim1=-2, dim2=-1))[..., None, :]
    to_unit = right * torch.where(squares <= 0, math.inf, squares).rsqrt()[..., None, :]
    left, squares = polish(panel @ to_unit.to(dtype), squares, sharding)
    return left, without_denormals(squares.sqrt().to(dtype)), right.to(dtype)


def _panel_factors(panel: Tensor, sharding: Sharding) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return multiplication by Q, and T, of a panel P = Q T: in float64 by QR, else from the eigenvectors of PᵀP."""
    if panel.dtype == torch.float64:
        basis, triangle = sharding.qr(panel)
        return basis.matmul, triangle
    inner = sharding.total(gram(panel))
    lengths = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    shortest = torch.finfo(panel.dtype).tiny / torch.finfo(panel.dtype).eps
    unit = torch.where(lengths <= shortest, 0, 1 / torch.where(lengths <= shortest, 1, lengths))
    noise = (4 * torch.finfo(panel.dtype).eps) ** 2
    values, vectors = leading_eigh(inner * unit[..., :, None] * unit[..., None, :], inner.shape[-1], inner.dtype, noise)
    transform = unit[..., :, None] * (vectors * torch.where(values <= 0, math.inf, values).rsqrt()[..., None, :])

    def times_basis(rotation: Tensor) -> Tensor:
        product: Tensor = panel @ (transform @ rotation.double()).to(panel.dtype)
        polished: Tensor = polish(product, panel.new_ones(()), sharding)[0]
        return polished

    return times_basis, values.sqrt()[..., :, None] * vectors.mT * lengths[..., None, :]


def _recentred(state: Centred, columns: Tensor, decay: Number, sharding: Sharding) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a batch minus its mean, with the distance between the means added, and the new sums of the stream."""
    function, mean = "svd_append", state.mean
    sharding.check_kind(function, "svd.mean", mean)
    mean = sharding.local(function, "svd.mean", mean, -1)
    weight = sharding.local_small(function, "svd.weight", state.weight)
    scatter = sharding.local_small(function, "svd.scatter", state.scatter)
    k = columns.shape[-1]
    old = weight * decay**2
    total = old + k
    share = torch.where(total > 0, k / total, 0.0)
    batch_mean = columns.mean(-1, dtype=torch.float64) if k else mean
    # Σ (x − μ)(x − μ)ᵀ over both = the sums about their own means + s sᵀ, s = √(old·k/total) (μ_old − μ_batch).
    # The batch minus its mean, B, has B 1 = 0, so (B + s 1ᵀ/√k)(B + s 1ᵀ/√k)ᵀ = B Bᵀ + s sᵀ needs no extra column.
    shift = (mean - batch_mean) * (old * share / max(k, 1)).sqrt()[..., None]
    centred = subtract_mean(columns, batch_mean - shift)
    added = sharding.total(torch.linalg.vector_norm(centred, dim=(-2, -1), dtype=torch.float64).square())
    # One non-finite entry makes the whole mean non-finite.
    mean = mean + (batch_mean - mean) * share[..., None] + 0 * added[..., None]
    numbers = map(sharding.small_result, (total + 0 * added, scatter * decay**2 + added))
    return centred, (sharding.tall_result(mean, -1), *numbers)


def _truncated_svd(core: Tensor, rank: int, tol: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading U, S and V of a core, without values up to ``tol`` times the largest."""
    rotation, spectrum, right_rotation = safe_svd(core, dtype)
    kept = spectrum[..., :rank]
    # NaN compares as false, so it stays.
    alive = ~(kept <= tol * kept[..., :1])
    return (
        rotation[..., :rank] * alive[..., None, :],
        without_denormals((kept * alive).to(dtype)),
        right_rotation[..., :rank] * alive[..., None, :],
    )
