"""The update with no eigendecomposition: matrix products and Cholesky factorisations only, and no host sync."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from brandla import _check
from brandla._core import truncate_by_subspace, without_denormals
from brandla._expansion import expand
from brandla._ranges import ranged
from brandla._step import Step, Update, check_in_place, check_update, decay_step
from brandla.lowrank import LowRankSym, Tracked
from brandla.rank import Rank


@overload
def subspace_update(
    sym: LowRankSym,
    columns: Tensor,
    *,
    decay: float | Tensor = ...,
    weight: float | Tensor = ...,
    rank: int | Rank | None = ...,
    iterations: int = ...,
) -> LowRankSym: ...


@overload
def subspace_update(
    sym: Tracked[LowRankSym],
    columns: Tensor,
    *,
    decay: float | Tensor = ...,
    weight: float | Tensor = ...,
    rank: int | Rank | None = ...,
    iterations: int = ...,
) -> Tracked[LowRankSym]: ...


@ranged("n,r", "n,k")
def subspace_update(
    sym: LowRankSym | Tracked[LowRankSym],
    columns: Tensor,
    *,
    decay: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    rank: int | Rank | None = None,
    iterations: int = 2,
) -> LowRankSym | Tracked[LowRankSym]:
    """Near-best rank-``rank`` truncation of ``decay * U S Uᵀ + weight * A Aᵀ``, with no eigendecomposition.

    The same target as `brandla.eigh_update`. The (r + k)-order core is compressed by subspace iteration from the
    unit vectors of its largest diagonal entries, so the whole update is matrix products and Cholesky factorisations:
    it never waits for the device and can be captured in a CUDA graph.

    Parameters
    ----------
    sym
        S (..., r, r) and U (..., n, r), or a `Tracked` one, whose error bound is then carried along.
    columns
        A, shape (..., n, k), in the dtype of the factor, or in bfloat16/float16 beside a float32 factor.
    decay, weight
        ρ and w, >= 0: numbers, or tensors of batch shape.
    rank
        Rank of the result, a number or a `brandla.Rank` rule: at most min(n, r + k), by default the old rank r.
    iterations
        Subspace iterations, at least 1. Two come within 5 % of what the exact update loses of the trace on every
        stream measured but one, which switches to an orthogonal subspace (``docs/subspace.md``).

    Returns
    -------
    LowRankSym or Tracked
        As ``sym`` was. New tensors: nothing is modified or shared.

    Raises
    ------
    ValueError, TypeError
        For shapes, values, dtypes and devices that do not fit, before anything is computed.

    Notes
    -----
    0 ⪯ M̂ ⪯ M holds to rounding, as for the exact update: the compression is a Nyström approximation. Not guaranteed is
    that the kept subspace is the leading one. The bound of a tracked factor grows by the Frobenius norm of what the
    compression left out. U and A may be DTensors sharded on their rows: ``docs/sharded.md``.

    References
    ----------
    N. Halko, P.-G. Martinsson, J. Tropp, SIAM Review 53 (2011), section 4.5, for subspace iteration; the warm start and
    its failure modes: ``docs/subspace.md``.
    """
    update = check_sym_update("subspace_update", sym, columns, decay, weight, rank)
    return subspace_step(update, _check.count("subspace_update", "iterations", iterations, 1)).as_new()


@overload
def subspace_update_(
    sym: LowRankSym,
    columns: Tensor,
    *,
    decay: float | Tensor = ...,
    weight: float | Tensor = ...,
    tol: float = ...,
    iterations: int = ...,
) -> LowRankSym: ...


@overload
def subspace_update_(
    sym: Tracked[LowRankSym],
    columns: Tensor,
    *,
    decay: float | Tensor = ...,
    weight: float | Tensor = ...,
    tol: float = ...,
    iterations: int = ...,
) -> Tracked[LowRankSym]: ...


@ranged("n,r", "n,k")
def subspace_update_(
    sym: LowRankSym | Tracked[LowRankSym],
    columns: Tensor,
    *,
    decay: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    tol: float = 0.0,
    iterations: int = 2,
) -> LowRankSym | Tracked[LowRankSym]:
    """`subspace_update` at the old rank, written over the tensors of ``sym``.

    Needs no second basis: the extra memory is that of the columns, and of small matrices.

    Parameters
    ----------
    sym, columns, decay, weight, iterations
        As for `subspace_update`; ``columns`` must not share memory with ``sym``.
    tol
        As in `brandla.Rank`: terms of the compressed core up to ``tol`` times the largest are left out.

    Returns
    -------
    LowRankSym or Tracked
        ``sym`` itself.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `subspace_update`, and for tensors of ``sym`` that are expanded and arguments that require grad, before
        anything is overwritten.
    """
    function = "subspace_update_"
    update = check_sym_update(function, sym, columns, decay, weight, None)
    update = check_in_place(function, "sym.basis", "sym.core", update, tol)
    return subspace_step(update, _check.count(function, "iterations", iterations, 1)).in_place(sym)


def check_sym_update(
    function: str,
    sym: LowRankSym | Tracked[LowRankSym],
    columns: Tensor,
    decay: float | Tensor,
    weight: float | Tensor,
    rank: int | Rank | None,
) -> Update:
    """Check the arguments of `subspace_update`, all but ``iterations``."""
    _check.sym(function, "sym", sym.lowrank if isinstance(sym, Tracked) else sym)
    return check_update(function, "sym.basis", "sym.core", sym, columns, decay, weight, rank)


def subspace_step(update: Update, iterations: int) -> Step[LowRankSym]:
    """Compute `subspace_update`, up to the rotation of U."""
    if update.adds_nothing:
        return decay_step(LowRankSym, update)
    core, basis, bound = update.old_values, update.basis, update.decayed_bound
    expansion = expand(core, basis, update.columns, update.decay, update.weight, update.rows)
    compressed, rotation = truncate_by_subspace(expansion.core, update.rank, iterations, core.dtype, update.tol)
    if bound is not None:
        bound = bound + _left_out(expansion.core, compressed, rotation).to(core.dtype)
    values = without_denormals(compressed.to(core.dtype), dims=2)
    return Step(LowRankSym, values, basis, (expansion, rotation), bound, update.rows)


def _left_out(core: Tensor, compressed: Tensor, rotation: Tensor) -> Tensor:
    """‖K − W S Wᵀ‖_F, from the difference itself."""
    left_out: Tensor = torch.linalg.vector_norm(core - rotation @ compressed @ rotation.mT, dim=(-2, -1))
    return left_out
