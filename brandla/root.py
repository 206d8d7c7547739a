"""The square-root form M̂ = F Fᵀ, and the steps of all symmetric updates: one Gram pass, a small core, one rotation.

With B = [√ρ F, √w A] the new matrix is B Bᵀ, and its eigenvalues are those of the core K = BᵀB, of order r + k. With
the leading eigenvectors W of K, F⁺ = B W is the root of the best truncation. Derivation: ``docs/updates.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from brandla import _check
from brandla._ranges import ranged
from brandla._sharded import PLAIN, UNSHARDED, Sharding, sharding_of
from brandla._small import truncate_core
from brandla.lowrank import (
    LowRankEigh,
    LowRankRoot,
    Rank,
    Tracked,
    as_tensors,
    from_parts,
    max_and_tol,
    stack_numbers,
    stacked,
)
from brandla_kernels import Tall, cross_gram, eigh_core, project, reads_are_free, root_core, rotate, rotate_, tall

Root = TypeVar("Root", LowRankRoot, Tracked[LowRankRoot])
Compress = Literal["eigh", "cholesky"]
# The small and the tall part of a factor, as messages name them.
_NAMES = {LowRankRoot: ("root.gram", "root.root"), LowRankEigh: ("eigh.eigenvalues", "eigh.eigenvectors")}
# The numbers that a tracked factor adds to its lowrank.
_TRACKED_NUMBERS = ("error_bound", "trace")


@ranged("n,r", "n,k")
def root_update(
    root: Root,
    columns: Tensor,
    *,
    decay: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    rank: int | Rank | None = None,
    compress: Compress = "eigh",
    shrink: bool = False,
) -> Root:
    """Best rank-``rank`` truncation of ``decay * F Fᵀ + weight * A Aᵀ``, in the square-root form.

    Equivalent to the leading eigenpairs of ``torch.linalg.eigh(decay * root.dense() + weight * A @ A.mT)`` and, in
    exact arithmetic, to `brandla.eigh_update`. It takes two passes over F and A: n(4rk + 2k² + 2r²) flops and
    O((r + k)³). It raises the errors of `eigh_update`.

    Parameters
    ----------
    root
        F (..., n, r) and S = FᵀF (..., r, r), or a `Tracked` factor, whose error bound and trace are then updated too.
    columns, decay, weight, rank
        A (..., n, k), ρ and w, and the rank of the result, as in `eigh_update`.
    compress
        ``"eigh"``: an eigendecomposition of order r + k, which waits for a GPU; S comes out diagonal, descending.
        ``"cholesky"``: products and Cholesky factorisations only. Nothing waits for the device, and a CUDA graph can
        capture the update. It leaves out up to 4 per cent more of the trace, averaged over a stream.
    shrink
        Frequent Directions: the largest eigenvalue left out, λ, is also subtracted from the kept eigenvalues. For every
        stream, the best approximations of M at lower ranks then bound ‖M − M̂‖₂. A truncation cannot promise this.
        `error_bound` of a tracked factor is Σ ρ^(t−i) λᵢ, and M̂ ⪯ M ⪯ M̂ + error_bound·I. Needs ``"eigh"``.

    Returns
    -------
    LowRankRoot or Tracked
        The type of ``root``, in new tensors: nothing is modified or shared.

    Notes
    -----
    The result never exceeds the true matrix: 0 ⪯ M̂ ⪯ M up to rounding. Rounding is relative to the largest eigenvalue
    d₁, so a damped solve is right to about ε·d₁/(λ (1 − ρ)). F and A may be DTensors sharded on their rows:
    ``docs/sharded.md``.

    References
    ----------
    M. Brand, Linear Algebra Appl. 415 (2006), for the update; this form: ``docs/updates.md``. V. Feinberg et al.,
    "Sketchy: memory-efficient adaptive regularization with Frequent Directions", arXiv 2302.03764, for ``shrink``.

    Examples
    --------
    >>> import torch, brandla
    >>> old = brandla.LowRankRoot.zeros(100, rank=4, dtype=torch.float64)
    >>> new = brandla.root_update(old, torch.eye(100, 6, dtype=torch.float64), decay=0.9, weight=0.5)
    >>> new.gram.diagonal()
    tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    update = check_update("root_update", root, columns, decay, weight, rank, compress, shrink, kind=LowRankRoot)
    updated: Root = root_step(update)
    return updated


@ranged("n,r", "n,k")
def root_update_(
    root: Root,
    columns: Tensor,
    *,
    decay: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    tol: float = 0.0,
    compress: Compress = "eigh",
    shrink: bool = False,
) -> Root:
    """`root_update` at the old rank, written over the tensors of ``root``, which it returns.

    Needs no second F. ``columns`` must not share memory with ``root``. ``tol`` is the tolerance of a `brandla.Rank`.
    Raises the errors of `root_update` and, before it overwrites anything, errors for expanded tensors of ``root`` and
    for arguments that require grad.

    Examples
    --------
    >>> import torch, brandla
    >>> root = brandla.LowRankRoot.zeros(8, rank=2)
    >>> _ = brandla.root_update_(root, 3 * torch.eye(8, 2))
    >>> root.trace()
    tensor(18.)
    """
    update = check_update("root_update_", root, columns, decay, weight, None, compress, shrink, kind=LowRankRoot)
    root_step(update.overwriting(tol))
    return root


def root_step(update: Update) -> Any:
    """Compute `root_update` from checked arguments."""
    small, of_root, of_columns, left_out, added_trace = update.truncated(unit=update.shrink)
    if update.shrink:
        small = (small - left_out[..., None]).clamp_min(0)
        of_root, of_columns = (part * small.sqrt()[..., None, :] for part in (of_root, of_columns))
    if update.compress == "eigh":
        # A non-finite core makes the left-out value non-finite too, and this sum carries it to S.
        small = torch.diag_embed(small) + 0 * left_out[..., None, None]
    return update.result(small, update.rotated(of_root, of_columns), left_out, added_trace)


class Update(NamedTuple):
    """The checked arguments of an update: of one factor, of a batch, or of a list of factors."""

    function: str
    kind: type[Any]  # of the factor
    small: Tensor  # S or d
    tall: Tall  # F or U
    columns: Tall
    k: int  # number of columns
    decay: float | Tensor
    weight: float | Tensor
    rank: int
    tol: float
    tracked: tuple[Tensor, ...] | None  # error bound and trace of a tracked factor
    sharding: Sharding  # of the tall matrices, in this process
    sparse: bool  # whether the columns are in one of torch's sparse layouts
    compress: Compress = "eigh"
    shrink: bool = False
    in_place: bool = False
    members: list[Sharding] | None = None  # the rows of each factor of a list

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the factor."""
        return self.small.dtype

    def truncated(self, *, unit: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return S⁺ or its eigenvalues, √ρ W₁, √w W₂, the value left out, and the trace that the columns add.

        This takes one pass over F and A. With ``"eigh"`` and ``unit``, the rotated columns have unit length and the
        signs of the old columns.
        """
        if self.sparse:
            columns = self.columns.double()
            cross, inner = self.coefficients(), (columns.mT @ columns).to_dense()
        else:
            cross, inner = cross_gram(self.tall, self.columns)
        if self.sharding is not UNSHARDED:
            cross, inner = self.sharding.totals(cross, inner)
        numbers: tuple[Any, Any] = self.decay, self.weight
        may_read = reads_are_free(cross)
        if self.compress == "cholesky" or not may_read or any(isinstance(number, Tensor) for number in numbers):
            # Ops take float64 tensors of the batch shape; on a CPU, `eigh_core` also takes numbers.
            numbers = as_tensors(*numbers, torch.float64, cross.device, cross.shape[:-2])
        small, needs_trace, r = self.small_or_nonfinite(), self.tracked is not None, cross.shape[-2]
        if self.compress == "cholesky":
            return root_core(small, cross, inner, *numbers, self.rank, self.tol, needs_trace)
        # On a CPU the core stays in float64, since its decomposition may be in float64.
        core, row_scales, scale = eigh_core(cross, inner, small, *numbers, rounded=not may_read)
        n = tall.rows(self.tall)
        values, rotation, left_out = truncate_core(core, row_scales, scale, self.rank, self.dtype, self.tol, unit, n)
        added_trace = None
        if needs_trace:
            # An empty coordinate has no positive entry, and the scale is NaN if the core is not finite.
            added_trace = core.diagonal(dim1=-2, dim2=-1)[..., r:].clamp_min(0).sum(-1) * scale
        return values, rotation[..., :r, :], rotation[..., r:, :], left_out, added_trace

    def coefficients(self) -> Tensor:
        """Return C = FᵀA in float64."""
        if not self.sparse:
            return project(self.tall, self.columns).double()
        transposed: Tensor = self.columns.double().mT @ self.tall.double()
        return transposed.mT

    def small_or_nonfinite(self) -> Tensor:
        """Return S or d, made non-finite if the tall matrix is; products with dense columns show that by themselves."""
        if self.k and not self.sparse:
            return self.small
        sums: Tensor = self.sharding.total(tall.stacked(tall.each(lambda matrix: matrix.sum((-2, -1)), self.tall)))
        return self.small + (0 * sums).view(*sums.shape, *[1] * (self.small.ndim - sums.ndim))

    def rotated(self, of_old: Tensor, of_columns: Tensor) -> Tall:
        """Return F W₁ + A W₂, or write it over the tall matrix, in one more pass."""
        if self.sparse:
            rotated = torch.addmm(self.tall @ of_old, self.columns, of_columns)
            return self.tall.copy_(rotated) if self.in_place else rotated
        if not self.in_place:
            return rotate(self.tall, self.columns, of_old, of_columns)
        rotate_(self.tall, self.columns, of_old, of_columns)
        return self.tall

    def result(self, small: Tensor, basis: Tall, left_out: Tensor, added_trace: Tensor | None) -> Any:
        """Return the updated factor or list of factors, with the updated numbers of tracked factors.

        In place, the small parts are written over the old small parts, as `rotated` did for the tall matrix.
        """
        tracked: tuple[Tensor, ...] = ()
        if self.tracked is not None and added_trace is not None:
            bound, trace = self.tracked
            tracked = _decayed_sum(bound, self.decay, left_out), _decayed_sum(trace, self.decay, added_trace)
        if self.in_place:
            for old, new in zip((self.small, *(self.tracked or ())), (small, *tracked), strict=True):
                old.copy_(new)
            return None
        if self.members is None:
            return _factor(self.kind, small, basis, self.sharding, *tracked)
        return [_factor(self.kind, *parts) for parts in zip(small, basis, self.members, *tracked, strict=True)]

    def overwriting(self, tol: float) -> Update:
        """Check that the factor can be overwritten, and return the update in place, with this tolerance."""
        _check.tolerance(self.function, tol)
        small_name, tall_name = _NAMES[self.kind]
        if self.rank < self.small.shape[-1]:
            rule = f"{tall_name} must have no more columns than rows, since the result takes its place"
            _check.fail_value(self.function, f"{rule}; got {self.small.shape[-1]} columns and {self.rank} rows")
        written = {tall_name: self.tall, small_name: self.small}
        written |= dict(zip(_TRACKED_NUMBERS, self.tracked or (), strict=False))
        read = {"columns": self.columns, "decay": self.decay, "weight": self.weight}
        for name, value in (written | read).items():
            if isinstance(value, Tensor):
                _check.without_gradient(self.function, name, value)
                if name in written:
                    _check.overwritable(self.function, name, value)
        # torch.compile of torch 2.11 fails on _replace here.
        return Update(**self._asdict() | {"tol": tol, "in_place": True})


def _factor(kind: type[Any], small: Tensor, basis: Tensor, sharding: Sharding, *tracked: Tensor) -> Any:
    """Return a factor from its local parts, tracked if an error bound and a trace are given."""
    if sharding is not UNSHARDED:
        small, basis = sharding.small_result(small), sharding.tall_result(basis)
        tracked = tuple(map(sharding.small_result, tracked))
    factor = from_parts(kind, small, basis)
    return Tracked(factor, *tracked) if tracked else factor


def check_update(
    function: str,
    factor: Any,
    columns: Tensor,
    decay: float | Tensor,
    weight: float | Tensor,
    rank: int | Rank | None,
    compress: Compress = "eigh",
    shrink: bool = False,
    *,
    kind: type[Any],
) -> Update:
    """Check the arguments of a symmetric update of a factor of this kind, tracked or not."""
    lowrank = factor.lowrank if isinstance(factor, Tracked) else factor
    check = _check.root if kind is LowRankRoot else _check.eigh
    small, basis = check(function, "root" if kind is LowRankRoot else "eigh", lowrank)
    _check.choice(function, "compress", compress, ("eigh", "cholesky"))
    if shrink and compress != "eigh":
        _check.fail_value(function, f"shrink needs eigenvalues, so compress='eigh'; got compress={compress!r}")
    small_name, tall_name = _NAMES[kind]
    sharding, tracked = sharding_of(function, tall_name, basis, small), None
    if sharding is not UNSHARDED or not PLAIN.issuperset(map(type, (small, columns, decay, weight))):
        sharding.check_kind(function, "columns", columns)
        small = sharding.local_small(function, small_name, small)
        decay, weight = sharding.local_small(function, "decay", decay), sharding.local_small(function, "weight", weight)
    if isinstance(factor, Tracked):
        numbers = dict(zip(_TRACKED_NUMBERS, factor[1:], strict=True))
        for field, number in numbers.items():
            _check.tracked(function, field, number, tall_name, basis)
        tracked = tuple(sharding.local_small(function, field, number) for field, number in numbers.items())
    sparse = is_sparse(columns)
    if sparse and columns.ndim > 2:
        _check.fail_value(function, f"sparse columns must have shape (n, k); got {tuple(columns.shape)}; pass a list")
    columns = _check.columns(function, "columns", columns, tall_name, basis)
    decay = _check.scalar(function, "decay", decay, tall_name, basis)
    weight = _check.scalar(function, "weight", weight, tall_name, basis)
    (n, r), k = basis.shape[-2:], columns.shape[-1]
    if rank is None:
        new_rank, tol = min(n, r), 0.0
    else:
        because = f"min(n, r + k) with n = {n}, r = {r}, k = {k}"
        requested, tol = max_and_tol(rank)
        new_rank = _check.rank(function, requested, r, min(n, r + k), because)
    if sharding is not UNSHARDED:
        basis, columns = sharding.local(function, tall_name, basis), sharding.local(function, "columns", columns)
    options = (new_rank, tol, tracked, sharding, sparse, compress, shrink)
    return Update(function, kind, small, basis, columns, k, decay, weight, *options)


def is_sparse(columns: Any) -> bool:
    """Return whether columns are a tensor in one of torch's sparse layouts."""
    return isinstance(columns, Tensor) and columns.layout != torch.strided


def stack(updates: Sequence[Update]) -> Update:
    """Join updates of single factors, of one r, k, rank and tolerance, into the update of a list."""
    first = updates[0]
    tracked = zip(*(update.tracked for update in updates if update.tracked is not None), strict=True)
    decays, weights = [update.decay for update in updates], [update.weight for update in updates]
    decay: float | Tensor
    weight: float | Tensor
    if isinstance(decays[0], Tensor) and isinstance(weights[0], Tensor):
        # Both share one tensor, so that later steps on both are one kernel.
        both = cast(Tensor, stack_numbers([*decays, *weights], first.small))
        decay, weight = both.view(2, -1).unbind()
    else:
        decay, weight = (stack_numbers(numbers, first.small) for numbers in (decays, weights))
    return first._replace(
        small=stacked([update.small for update in updates]),
        tall=[update.tall for update in updates],
        columns=[update.columns for update in updates],
        decay=decay,
        weight=weight,
        tracked=first.tracked and tuple(map(stacked, tracked)),
        members=[update.sharding for update in updates],
    )


def _decayed_sum(number: Tensor, decay: float | Tensor, new: Tensor) -> Tensor:
    """Return ρ · number + new, in one kernel."""
    new = new.to(number.dtype)
    return torch.addcmul(new, decay, number) if isinstance(decay, Tensor) else torch.add(new, number, alpha=decay)
