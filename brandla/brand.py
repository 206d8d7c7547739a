"""Brand's symmetric update in an orthonormal form (the step of the root, polished), and its inverse, the downdate."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._small import noise_level, safe_eigh, signs_of
from brandla.lowrank import LowRankEigh, Number, Rank, Tracked, add_dims
from brandla.orthonormal import polish
from brandla.root import Update, check_update

Eigh = TypeVar("Eigh", LowRankEigh, Tracked[LowRankEigh])


@ranged("n,r", "n,k")
def eigh_update(
    eigh: Eigh, columns: Tensor, *, decay: Number = 1.0, weight: Number = 1.0, rank: int | Rank | None = None
) -> Eigh:
    """Best rank-``rank`` truncation of ``decay * U diag(d) Uᵀ + weight * A Aᵀ``.

    Equivalent to the leading eigenpairs of ``torch.linalg.eigh(decay * eigh.dense() + weight * A @ A.mT)``, in
    O(n (r + k)²) + O((r + k)³) operations in place of O(n³), and with no n × n matrix. Raises a RuntimeError if the
    eigendecomposition, of order r + k, fails even in float64.

    Parameters
    ----------
    eigh
        d (..., r) and U (..., n, r), or a `Tracked` factor, whose error bound and trace are then updated too.
    columns
        A, shape (..., n, k), in the dtype of the factor, or in bfloat16/float16 with a float32 factor. Or a sparse
        tensor (n, k), COO or CSR, of which no dense copy is made.
    decay, weight
        ρ and w, >= 0: numbers, or tensors of batch shape. For an exponential moving average take ρ and 1 − ρ, and put
        the normalisation of the data (such as 1/√k) into A.
    rank
        Rank of the result, a number or a `brandla.Rank` rule: at most min(n, r + k), by default the old rank r.

    Notes
    -----
    0 ⪯ M̂ ⪯ M up to rounding, and ‖UᵀU − I‖₂ is a few ε: U is polished, on a CPU only if an estimate of that norm is
    above 20 ε. Eigenvalues up to 8 ε of the largest, or √(r + k) ε if that is more, are rounding: they become 0, with
    zero columns. The derivative by eigenvalues that are 0 is NaN. The eigendecomposition waits for the device;
    `brandla.root_update` with ``compress="cholesky"`` does not. U and A may be sharded on their rows
    (``docs/sharded.md``). Source: M. Brand, "Fast low-rank modifications of the thin singular value decomposition",
    Linear Algebra Appl. 415 (2006). Derivation: ``docs/updates.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> old = brandla.LowRankEigh.zeros(100, rank=4, dtype=torch.float64)
    >>> new = brandla.eigh_update(old, torch.eye(100, 6, dtype=torch.float64), decay=0.9, weight=0.5)
    >>> new.eigenvalues
    tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    update = check_update("eigh_update", eigh, columns, decay, weight, rank, kind=LowRankEigh)
    updated: Eigh = eigh_step(update)
    return updated


@ranged("n,r", "n,k")
def eigh_update_(eigh: Eigh, columns: Tensor, *, decay: Number = 1.0, weight: Number = 1.0, tol: float = 0.0) -> Eigh:
    """`eigh_update` at the old rank, written over the tensors of ``eigh``, which it returns.

    Needs no second basis. ``columns`` must not share memory with ``eigh``. ``tol`` is the tolerance of a
    `brandla.Rank`. Raises the errors of `eigh_update` and, before it overwrites anything, errors for expanded tensors
    of ``eigh`` and for arguments that require grad.

    Examples
    --------
    >>> import torch, brandla
    >>> eigh = brandla.LowRankEigh.zeros(8, rank=2)
    >>> _ = brandla.eigh_update_(eigh, 3 * torch.eye(8, 2))
    >>> eigh.eigenvalues
    tensor([9., 9.])
    """
    update = check_update("eigh_update_", eigh, columns, decay, weight, None, kind=LowRankEigh)
    eigh_step(update.overwriting(tol))
    return eigh


def eigh_step(update: Update) -> Any:
    """Compute `eigh_update` from checked arguments: the step of the root F = U √d, with unit columns, polished."""
    m = update.small.shape[-1] + update.k
    update = update._replace(tol=max(update.tol, noise_level(update.dtype, m)))
    values, of_old, of_columns, left_out, added_trace = update.truncated(unit=True)
    rotated = update.rotated(of_old, of_columns)
    vectors, values = polish(rotated, values, update.sharding, in_place=update.in_place)
    return update.result(values, vectors, left_out, added_trace)


@ranged("n,r", "n,k")
def eigh_downdate(eigh: LowRankEigh, columns: Tensor, *, weight: Number = 1.0) -> LowRankEigh:
    """Take columns back: ``U diag(d) Uᵀ - weight * A Aᵀ`` within the span of U, with negative eigenvalues set to 0.

    The inverse of an `eigh_update` that truncated nothing; together they make a sliding window. Costs 2nrk + 2nr² flops
    and O(r³). Arguments and errors are as in `eigh_update`. The factor must not be tracked, and keeps its rank.

    Notes
    -----
    ``columns`` are usually columns of an earlier update, scaled by the share that ``decay`` has left. The part of A
    outside the span of U is ignored: an earlier update truncated it. Values up to 8 ε (√r ε above rank
    64) times d₁ + w‖UᵀA‖_F² are rounding: they become 0, with zero columns. Error bounds: ``docs/updates.md``.

    Examples
    --------
    >>> import torch, brandla
    >>> window = brandla.LowRankEigh.zeros(100, rank=8, dtype=torch.float64)
    >>> first, second = torch.randn(2, 100, 4, dtype=torch.float64)
    >>> window = brandla.eigh_update(brandla.eigh_update(window, first), second)
    >>> torch.dist(brandla.eigh_downdate(window, first).dense(), second @ second.mT) < 1e-10
    tensor(True)
    """
    # Refuses a tracked factor, since a downdate cannot update its error bound and trace.
    _check.eigh("eigh_downdate", "eigh", eigh)
    update = check_update("eigh_downdate", eigh, columns, 1.0, weight, None, kind=LowRankEigh)
    cross = update.sharding.total(update.coefficients())
    removed = cross @ cross.mT * add_dims(update.weight, 2)
    # diag(d) − w CCᵀ may be indefinite. A shift by tr(w CCᵀ) makes it positive semi-definite, as safe_eigh requires.
    shift = removed.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    values, rotation = safe_eigh(torch.diag_embed(update.small_or_nonfinite() + shift) - removed)
    values = (values - shift).to(update.dtype)
    vanishes = values <= noise_level(update.dtype, values.shape[-1]) * (update.small[..., :1] + shift)
    values, rotation = torch.where(vanishes, 0, values), torch.where(vanishes[..., None, :], 0, rotation)
    rotation = rotation * signs_of(rotation.diagonal(dim1=-2, dim2=-1))[..., None, :]
    vectors, values = polish(update.tall @ rotation.to(update.dtype), values, update.sharding)
    updated: LowRankEigh = update.result(values, vectors, values, None)
    return updated
