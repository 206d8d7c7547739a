"""The square-root form M̂ = F Fᵀ, and what all symmetric updates share: one Gram pass, one small core, one rotation.

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
from brandla._sharded import PLAIN, WHOLE, Rows, rows_of
from brandla._small import leading_of
from brandla.lowrank import (
    LowRankEigh,
    LowRankRoot,
    Rank,
    Tracked,
    most_of,
    of_parts,
    stack_numbers,
    stacked,
    tolerance_of,
    two_numbers,
)
from brandla_kernels import Tall, cross_gram, eigh_core, project, reads_are_free, root_core, rotate, rotate_, tall

Root = TypeVar("Root", LowRankRoot, Tracked[LowRankRoot])
Compress = Literal["eigh", "cholesky"]
# The small part of a factor and the tall one, as they are called in messages.
_NAMES = {LowRankRoot: ("root.gram", "root.root"), LowRankEigh: ("eigh.eigenvalues", "eigh.eigenvectors")}
# What a tracked factor carries along.
_CARRIED = ("error_bound", "trace")


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
    exact arithmetic, to `brandla.eigh_update`, in two passes over F and A: n(2rk + k² + 2(r + k)r) flops and
    O((r + k)³). Raises as `eigh_update` does.

    Parameters
    ----------
    root
        F (..., n, r) and S = FᵀF (..., r, r), or a `Tracked` factor: its error bound and trace are then updated too.
    columns, decay, weight, rank
        A (..., n, k), ρ and w, and the rank of the result, as in `eigh_update`.
    compress
        ``"eigh"``: an eigendecomposition of order r + k, which waits for a GPU; S comes out diagonal, descending.
        ``"cholesky"``: products and Cholesky factorisations alone. Nothing waits for the device, and a CUDA graph can
        capture it. It leaves out up to 4 per cent more of the trace, in the mean over a stream.
    shrink
        Frequent Directions: the largest eigenvalue left out, λ, is subtracted from the kept ones too. For every stream,
        the best approximations of M at lower ranks then bound ‖M − M̂‖₂. A truncation cannot promise this.
        `error_bound` of a tracked factor is Σ ρ^(t−i) λᵢ, and M̂ ⪯ M ⪯ M̂ + error_bound·I. Needs ``"eigh"``.

    Returns
    -------
    LowRankRoot or Tracked
        As ``root`` was. New tensors: nothing is modified or shared.

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
    Raises as `root_update` does and, before anything is overwritten, for expanded tensors of ``root`` and arguments
    that require grad.

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
    small, of_root, of_columns, left_out, added = update.truncated(unit=update.shrink)
    if update.shrink:
        small = (small - left_out[..., None]).clamp_min(0)
        of_root, of_columns = (part * small.sqrt()[..., None, :] for part in (of_root, of_columns))
    if update.compress == "eigh":
        # What poisons a core reaches what is left out of it.
        small = torch.diag_embed(small) + 0 * left_out[..., None, None]
    return update.result(small, update.rotated(of_root, of_columns), left_out, added)


class Update(NamedTuple):
    """Arguments of an update that fit together: of one factor, of a batch, or of a list of factors."""

    function: str
    kind: type[Any]  # of the factor
    small: Tensor  # S or d
    tall: Tall  # F or U
    columns: Tall
    decay: float | Tensor
    weight: float | Tensor
    rank: int
    tol: float
    tracked: tuple[Tensor, ...] | None  # error bound and trace of a tracked factor
    rows: Rows  # which rows of the tall matrices are here
    sparse: bool  # whether the columns are in one of torch's sparse layouts
    compress: Compress = "eigh"
    shrink: bool = False
    in_place: bool = False
    members: list[Rows] | None = None  # which rows are here of each factor of a list

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the factor."""
        return self.small.dtype

    def truncated(self, *, unit: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return S⁺ or its eigenvalues, √ρ W₁, √w W₂, what is left out, and the trace that the columns add.

        That takes one pass over F and A. By ``"eigh"`` the rotated columns are, with ``unit``, of unit length, and
        have the signs of the old ones.
        """
        if self.sparse:
            columns = self.columns.double()
            cross, own = self.coefficients(), (columns.mT @ columns).to_dense()
        else:
            cross, own = cross_gram(self.tall, self.columns)
        if self.rows is not WHOLE:
            cross, own = self.rows.totals(cross, own)
        numbers: tuple[Any, Any] = self.decay, self.weight
        is_free = reads_are_free(cross)
        if self.compress == "cholesky" or not is_free or any(isinstance(number, Tensor) for number in numbers):
            # What is launched takes tensors of the batch shape.
            numbers = two_numbers(*numbers, torch.float64, cross.device, cross.shape[:-2])
        small, measure, r = self.poisoned(self.small), self.tracked is not None, cross.shape[-2]
        if self.compress == "cholesky":
            return root_core(small, cross, own, *numbers, self.rank, self.tol, measure)
        # On a CPU the decomposition may be in float64.
        core, rows, scale = eigh_core(cross, own, small, *numbers, rounded=not is_free)
        n = tall.rows(self.tall)
        values, rotation, left_out = leading_of(core, rows, scale, self.rank, self.dtype, self.tol, unit, n)
        added = None
        if measure:
            # An empty coordinate has no positive entry, and σ is NaN where the core is not finite.
            added = core.diagonal(dim1=-2, dim2=-1)[..., r:].clamp_min(0).sum(-1) * scale
        return values, rotation[..., :r, :], rotation[..., r:, :], left_out, added

    def coefficients(self) -> Tensor:
        """Return C = FᵀA alone, in float64."""
        if not self.sparse:
            return project(self.tall, self.columns).double()
        of_root: Tensor = self.columns.double().mT @ self.tall.double()
        return of_root.mT

    def poisoned(self, small: Tensor) -> Tensor:
        """Return S or d, not finite where the tall matrix is not, if columns would not tell or might not."""
        if tall.columns(self.columns) and not self.sparse:
            return small
        sums: Tensor = self.rows.total(tall.stacked(tall.each(lambda matrix: matrix.sum((-2, -1)), self.tall)))
        return small + (0 * sums).view(*sums.shape, *[1] * (small.ndim - sums.ndim))

    def rotated(self, of_old: Tensor, of_columns: Tensor) -> Tall:
        """Return F W₁ + A W₂, or write it over the tall matrix: one more pass."""
        if self.sparse:
            rotated = torch.addmm(self.tall @ of_old, self.columns, of_columns)
            return self.tall.copy_(rotated) if self.in_place else rotated
        if not self.in_place:
            return rotate(self.tall, self.columns, of_old, of_columns)
        rotate_(self.tall, self.columns, of_old, of_columns)
        return self.tall

    def result(self, small: Tensor, basis: Tall, left_out: Tensor, added: Tensor | None) -> Any:
        """Return the updated factor, or those of a list, with the numbers of a tracked one carried along.

        In place, what is small is written over that of the old factor, as the tall matrix is already.
        """
        tracked: tuple[Tensor, ...] = ()
        if self.tracked is not None and added is not None:
            bound, trace = self.tracked
            tracked = _carried(bound, self.decay, left_out), _carried(trace, self.decay, added)
        if self.in_place:
            for old, new in zip((self.small, *(self.tracked or ())), (small, *tracked), strict=True):
                old.copy_(new)
            return None
        if self.members is None:
            return _factor(self.kind, small, basis, self.rows, *tracked)
        each = zip(small, basis, self.members, *tracked, strict=True)
        return [_factor(self.kind, *parts) for parts in each]

    def overwriting(self, tol: float) -> Update:
        """Check what overwriting the factor needs besides, and return the update with that tolerance."""
        _check.tolerance(self.function, tol)
        small_name, name = _NAMES[self.kind]
        written = {name: self.tall, small_name: self.small}
        written |= dict(zip(_CARRIED, self.tracked or (), strict=False))
        read = {"columns": self.columns, "decay": self.decay, "weight": self.weight}
        for name, value in (written | read).items():
            if isinstance(value, Tensor):
                _check.without_gradient(self.function, name, value)
                if name in written:
                    _check.written(self.function, name, value)
        # The compiler of torch 2.11 fails on a _replace here.
        return Update(**self._asdict() | {"tol": tol, "in_place": True})


def _factor(kind: type[Any], small: Tensor, basis: Tensor, rows: Rows, *tracked: Tensor) -> Any:
    """Return a factor of which these rows are here, tracked if it has an error bound and a trace."""
    if rows is not WHOLE:
        small, basis = rows.small_result(small), rows.tall_result(basis)
        tracked = tuple(map(rows.small_result, tracked))
    factor = of_parts(kind, small, basis)
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
    own = factor.lowrank if isinstance(factor, Tracked) else factor
    check = _check.root if kind is LowRankRoot else _check.eigh
    small, basis = check(function, "root" if kind is LowRankRoot else "eigh", own)
    _check.choice(function, "compress", compress, ("eigh", "cholesky"))
    if shrink and compress != "eigh":
        _check.fail_value(function, f"shrink needs eigenvalues, so compress='eigh'; got compress={compress!r}")
    small_name, name = _NAMES[kind]
    rows, tracked = rows_of(function, name, basis, small), None
    if rows is not WHOLE or not PLAIN.issuperset(map(type, (small, columns, decay, weight))):
        rows.admit(function, "columns", columns)
        small = rows.small(function, small_name, small)
        decay, weight = rows.small(function, "decay", decay), rows.small(function, "weight", weight)
    if isinstance(factor, Tracked):
        numbers = dict(zip(_CARRIED, factor[1:], strict=True))
        for each, number in numbers.items():
            _check.tracked(function, each, number, name, basis)
        tracked = tuple(rows.small(function, each, number) for each, number in numbers.items())
    sparse = is_sparse(columns)
    if sparse and columns.ndim > 2:
        _check.fail_value(function, f"sparse columns must have shape (n, k); got {tuple(columns.shape)}; pass a list")
    columns = _check.columns(function, "columns", columns, name, basis)
    decay = _check.scalar(function, "decay", decay, name, basis)
    weight = _check.scalar(function, "weight", weight, name, basis)
    (n, r), k = basis.shape[-2:], columns.shape[-1]
    if rank is None:
        most, tol = min(n, r), 0.0
    else:
        because = f"min(n, r + k) with n = {n}, r = {r}, k = {k}"
        most, tol = _check.rank(function, most_of(rank), r, min(n, r + k), because), tolerance_of(rank)
    if rows is not WHOLE:
        basis, columns = rows.local(function, name, basis), rows.local(function, "columns", columns)
    return Update(
        function, kind, small, basis, columns, decay, weight, most, tol, tracked, rows, sparse, compress, shrink
    )


def is_sparse(columns: Any) -> bool:
    """Say whether these are columns in one of torch's sparse layouts."""
    return isinstance(columns, Tensor) and columns.layout != torch.strided


def stack(updates: Sequence[Update]) -> Update:
    """Join updates of one r, k, rank and tolerance, of single factors, into that of a list."""
    first = updates[0]
    tracked = zip(*(update.tracked for update in updates if update.tracked is not None), strict=True)
    decays, weights = [update.decay for update in updates], [update.weight for update in updates]
    decay: float | Tensor
    weight: float | Tensor
    if isinstance(decays[0], Tensor) and isinstance(weights[0], Tensor):
        # In one tensor, since what is done to both is then one kernel.
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
        members=[update.rows for update in updates],
    )


def _carried(number: Tensor, decay: float | Tensor, new: Tensor) -> Tensor:
    """Return ρ times a number and what is new, in one kernel."""
    new = new.to(number.dtype)
    return torch.addcmul(new, decay, number) if isinstance(decay, Tensor) else torch.add(new, number, alpha=decay)
