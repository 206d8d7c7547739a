"""A low-rank factor with its shift λ and its tail τ, as the ops apply its powers: derivations in ``docs/damped.md``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import brandla_kernels as ops
from brandla import _check
from brandla._sharded import PLAIN, WHOLE, Rows, rows_of
from brandla._small import Spectrum, noise_level, safe_eigh, spectrum
from brandla.lowrank import (
    LowRankEigh,
    LowRankRoot,
    Number,
    Tracked,
    add_dims,
    check_factor,
    stack_numbers,
    two_numbers,
)
from brandla.orthonormal import times
from brandla_kernels import Tall, tall

Factor = LowRankEigh | LowRankRoot
LowRank = Factor | Tracked[LowRankEigh] | Tracked[LowRankRoot]
Tail = Number | Literal["mean", "smallest"]


class Shifted(NamedTuple):
    """β (I + U Z Uᵀ) for the tall matrix U of one factor, of a batch, or of a list of factors with Z and β stacked."""

    basis: Tall
    middle: Tensor  # Z: [..., r] where diagonal, else [..., r, r]
    scale: Tensor  # β: batch shape

    def __matmul__(self, rhs: Tall) -> Tall:
        return ops.damped_apply(*aligned(self, rhs))

    def on(self, rhs: Tall, rows: Rows) -> Any:
        """Return the product with a right-hand side of which these rows are here."""
        if rows is WHOLE:
            return self @ rhs
        basis, middle, scale, rhs = aligned(self, rhs)
        middle, scale = rows.shared(middle), rows.shared(scale)
        coefficients = rows.total(ops.project(basis, rhs))
        inner = middle[..., None] * coefficients if middle.ndim < basis.ndim else middle @ coefficients
        return scale[..., None, None] * (rhs + basis @ inner)


class Inverse(NamedTuple):
    """β (I + U Z Uᵀ) for p = −1, of one factor, a batch or a list; Z and β are left to the op, which takes d or S."""

    basis: Tall
    small: Tall
    damping: Tensor  # of batch shape, as the tail
    tail: Tensor

    def __matmul__(self, rhs: Tall) -> Tall:
        return ops.damped_inverse(*aligned(self, rhs))


def aligned(*operands: Shifted | Inverse | Tall) -> list[Any]:
    """Return the parts of operators, and tall matrices, repeated over their common batch shape as views."""
    groups = [each if isinstance(each, tuple) else (each,) for each in operands]
    if isinstance(groups[0][0], list) or len({group[0].shape[:-2] for group in groups}) == 1:
        return [*chain.from_iterable(groups)]
    batch = torch.broadcast_shapes(*(group[0].shape[:-2] for group in groups))
    return [part.expand(*batch, *part.shape[group[0].ndim - 2 :]) for group in groups for part in group]


class Side(NamedTuple):
    """A factor and its shift: of one factor, of a batch, or of a list, whose small parts are a list or `stacked`."""

    kind: type[Factor]
    small: Tall  # d or S
    basis: Tall  # U or F
    damping: Number
    tail: Number | None  # None stands for "smallest"
    rows: Rows  # which rows of U or F are here
    diagonal: Tensor | None = None  # δ

    @property
    def is_root(self) -> bool:
        """Whether M̂ = F Fᵀ, in which every value up to τ counts as τ."""
        return self.kind is LowRankRoot

    def stacked(self) -> Side:
        """Return the same with the small parts of a list stacked, as all takes them but the inverse."""
        return self if isinstance(self.small, Tensor) else self._replace(small=torch.stack(self.small))

    def inverse(self) -> Inverse | None:
        """Return the inverse; None where a look at values is free, Z takes eigenvalues of S, or some rows are away."""
        small, basis = self.small, self.basis
        single = isinstance(small, Tensor)
        like = small if single else small[0]
        if self.rows is not WHOLE or ops.reads_are_free(like) or (self.is_root and not _is_zero(self.tail)):
            return None
        tail = _smallest(tall.stacked(small)) if self.tail is None else self.tail
        batch = basis.shape[:-2] if single else (len(basis),)
        return Inverse(basis, small, *two_numbers(self.damping, tail, like.dtype, like.device, batch))

    def operator(self, exponent: float = -1.0) -> Shifted:
        """(M̂ + τ(I − P) + λI)^p = β (I + U Z Uᵀ) with β = (τ + λ)^p and Z = ((d + λ)/(τ + λ))^p − 1.

        Of a root, whose columns along eigenvectors of S are √d times unit ones, Z is divided by d, and 0 for every d up
        to τ; for p = −1 and τ = 0 that is −(S + λI)⁻¹.
        """
        damping, (levels, tail) = self.damping, self._levels(needed=exponent != -1)
        if levels is None:
            return Shifted(self.basis, -ops.damped_gram_inverse(self.small, damping), self._filled(1 / damping))

        def middle(values: Tensor) -> Tensor:
            above = values + add_dims(damping)
            if exponent == -1:
                return self._missing(values, tail) / above
            shift = add_dims(tail + damping)
            if not self.is_root:
                return (above / shift) ** exponent - 1
            # Divided by d, however small.
            part = torch.expm1(exponent * torch.log1p((_at_least(values, tail) - add_dims(tail)) / shift))
            return part / torch.where(values > 0, values, 1)

        inner, shift = levels.apply(middle), tail + damping
        scale = self._filled(1 / shift) if exponent == -1 else self._filled(shift) ** exponent
        return Shifted(self.basis, inner, scale)

    def logdet(self) -> Tensor:
        """Return the log-determinant, the same in every process."""
        if self.diagonal is not None:
            whole, _, _, core = self._beside(self.diagonal)
            of_core: Tensor = torch.linalg.slogdet(core).logabsdet
            return whole.log().sum(-1) + of_core
        values, tail = self.counted(needed=False)
        if values is None:
            held = 2 * ops.damped_cholesky(self.small, self.damping).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        else:
            held = (values + add_dims(self.damping)).log().sum(-1)
        return self.rows.small_result(held + self.unheld() * self._filled(tail + self.damping).log())

    def unheld(self) -> Number:
        """Return n − r, the number of directions that no column stands for."""
        small, basis = self.small, self.basis
        r: int = small.shape[-1]
        if isinstance(basis, Tensor):
            return self.rows.count(basis) - r
        return stack_numbers([each.shape[-2] - r for each in basis], small)

    def data(self, function: str, name: str, tensor: Tensor, of_name: str) -> Tensor:
        """Check that a tall argument is of the kind, the dtype and the device of the factor, and return it in those."""
        if self.rows is not WHOLE or type(tensor) is not Tensor:
            self.rows.check_kind(function, name, tensor)
        return _check.matching_data(function, name, tensor, of_name, self.basis)

    def here(self, function: str, name: str, block: Tensor) -> Tensor:
        """Check that the batch shapes of a tall argument and of the factor broadcast, and return what is here of it."""
        _check.batches(function, name, block, self.basis)
        return block if self.rows is WHOLE else self.rows.local(function, name, block)

    def counted(self, *, needed: bool = True) -> tuple[Tensor | Any, Number]:
        """Return the eigenvalues on the span of the tall matrix, τ in place of those of zero columns, and τ."""
        levels, tail = self._levels(needed)
        if levels is None:
            return None, tail
        if self.is_root:
            return _at_least(levels.values, tail), tail
        if _is_zero(tail):
            return levels.values, tail
        lengths = tall.each(lambda basis: basis.detach().square().sum(-2), self.basis)
        missing = self.rows.total(tall.stacked(lengths)) == 0
        return torch.where(missing, add_dims(tail), levels.values), tail

    def spanned(self) -> tuple[Tall, tuple[Tensor, Number]]:
        """Return eigenvectors, and what `counted` does; of a root by one more pass, with τ for what is not resolved."""
        if not self.is_root:
            return self.basis, self.counted()
        gram = self.small
        values, turn = safe_eigh((gram + gram.mT) / 2)
        tail = _smallest(values) if self.tail is None else self.tail
        noise = noise_level(gram.dtype, gram.shape[-1]) * values[..., :1]
        gone = (values <= noise) | (values <= add_dims(tail))
        turn = torch.where(gone[..., None, :], 0, turn * torch.where(gone, 1, values).rsqrt()[..., None, :])
        return times(self.basis, turn), (torch.where(gone, add_dims(tail), values), tail)

    def solve_beside(self, diagonal: Tensor, rhs: Tensor) -> Tensor:
        """Return (M̂ + τ(I − P) + λI + diag(δ))⁻¹ V = D^−½ (I − B̂ C K⁻¹ B̂ᵀ) D^−½ V."""
        whole, scaled, weights, core = self._beside(diagonal)
        lengths = whole.rsqrt()[..., None]
        middle, _ = torch.linalg.solve_ex(core, weights, left=False)
        one = whole.new_ones(()).expand(scaled.shape[:-2])
        solution: Tensor = Shifted(scaled, -middle, one) @ (lengths * rhs)
        return lengths * solution

    def _beside(self, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return D, B̂ = D^−½ B, C and the core K = I + B̂ᵀB̂ C of the operator with diag(δ) added, D + B C Bᵀ.

        Here D = λ + τ + δ, and C = diag(d − τ), of a root divided by d.
        """
        basis, (levels, tail) = self.basis, self._levels()
        if levels is None:
            weights = torch.ones_like(self.small[..., 0])
        else:
            weights = -levels.apply(lambda values: self._missing(values, tail))
        weights = weights if weights.ndim == basis.ndim else torch.diag_embed(weights)
        whole = add_dims(tail + self.damping) + diagonal
        scaled = whole.rsqrt()[..., None] * basis
        identity = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
        return whole, scaled, weights, identity + ops.project(scaled, scaled) @ weights

    def _missing(self, values: Tensor, tail: Number) -> Tensor:
        """Return τ − d; of a root min(τ − d, 0)/d."""
        if not self.is_root:
            return add_dims(tail) - values
        return (add_dims(tail) - _at_least(values, tail)) / torch.where(values > 0, values, 1)

    def _levels(self, needed: bool = False) -> tuple[Spectrum | Any, Number]:
        """Return the eigenvalues that the factor holds, of a root with what it takes for functions of S, and τ.

        None of a root with τ = 0 whose S has to be decomposed for them, if they are not ``needed``.
        """
        small, levels = self.small, None
        if not self.is_root:
            levels = Spectrum(small)
        elif ops.reads_are_free(small) and not small.requires_grad:
            # `root_update` leaves nothing beside the diagonal.
            diagonal = small.diagonal(dim1=-2, dim2=-1)
            levels = Spectrum(diagonal) if torch.equal(small, torch.diag_embed(diagonal)) else None
        if levels is None and _is_zero(self.tail) and not needed:
            return None, 0.0
        levels = levels or spectrum((small + small.mT) / 2)
        return levels, _smallest(levels.values) if self.tail is None else self.tail

    def _filled(self, value: Number) -> Tensor:
        """Return a number as a tensor of the factor's batch shape."""
        batch = self.small.shape[: -2 if self.is_root else -1]
        if isinstance(value, Tensor):
            return value if value.shape == batch else value.expand(batch)
        return torch.full(batch, value, dtype=self.small.dtype, device=self.small.device)


def join(sides: Sequence[Side]) -> Side:
    """Return sides whose factors are of one kind and rank as that of a list."""
    kinds, smalls, bases, dampings, tails, *_ = zip(*sides, strict=True)
    like = smalls[0]
    tail = None if tails[0] is None else stack_numbers(tails, like)
    return Side(kinds[0], list(smalls), list(bases), stack_numbers(dampings, like), tail, WHOLE)


def _at_least(values: Tensor, tail: Number) -> Tensor:
    """Return max(d, τ), whose derivative at d = τ is that of τ; NaN stays."""
    return torch.where(values <= add_dims(tail), add_dims(tail), values)


def _is_zero(tail: Number | None) -> bool:
    """Say whether τ is the number 0, which takes no look at a device."""
    return isinstance(tail, float) and tail == 0


def _smallest(values: Tensor) -> Tensor:
    return values.amin(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])


def check_side(
    function: str, lowrank: LowRank, damping: Number, tail: Tail, side: str = "", diagonal: Tensor | None = None
) -> Side:
    """Check a factor, tracked or not, λ, τ and δ if there is one, and return what is here of them."""
    factor: Factor = lowrank.lowrank if isinstance(lowrank, Tracked) else lowrank
    name, prefix = (side, f"{side}_") if side else ("lowrank", "")
    damping_name, tail_name = f"{prefix}damping", f"{prefix}tail"
    small, basis = check_factor(function, name, factor)
    small_name, basis_name = factor._fields[::-1] if isinstance(factor, LowRankRoot) else factor._fields
    rows = WHOLE if type(basis) is Tensor else rows_of(function, f"{name}.{basis_name}", basis, small)
    if rows is not WHOLE or not PLAIN.issuperset(map(type, (small, damping, tail))):
        small = rows.local_small(function, f"{name}.{small_name}", small)
        damping = rows.local_small(function, damping_name, damping)
        tail = tail if isinstance(tail, str) else rows.local_small(function, tail_name, tail)
    damping = _check.scalar(function, damping_name, damping, "the factor", basis, positive=True)
    if isinstance(tail, str):
        given = _named_tail(function, tail_name, tail, lowrank, basis, rows)
    else:
        given = _check.scalar(function, tail_name, tail, "the factor", basis)
    if rows is not WHOLE:
        basis = rows.local(function, f"{name}.{basis_name}", basis)
    found = Side(type(factor), small, basis, damping, given, rows)
    return found if diagonal is None else _with_diagonal(function, found, diagonal)


def _named_tail(function: str, name: str, tail: str, lowrank: LowRank, basis: Tensor, rows: Rows) -> Number | None:
    if tail == "smallest":
        return None
    if tail != "mean":
        _check.fail_value(function, f"{name} must be a number, a tensor, 'mean' or 'smallest'; got {tail!r}")
    if not isinstance(lowrank, Tracked):
        rule = f"{name}='mean' needs a Tracked factor, which carries the trace"
        _check.fail_value(function, f"{rule}; got a {type(lowrank).__name__}; start the stream with brandla.track")
    factor: Factor = lowrank.lowrank
    _check.tracked(function, "trace", lowrank.trace, "the factor", basis)
    trace, held = (rows.local_small(function, "trace", each) for each in (lowrank.trace, factor.trace()))
    # (tr M − tr M̂)/(n − r), the mean of the eigenvalues left out; 0, as its derivative, where the traces agree.
    left_out = torch.nn.functional.threshold(trace - held, 0, 0)
    return left_out / max(factor.n - factor.rank, 1) * (factor.n > factor.rank)


def _with_diagonal(function: str, side: Side, diagonal: Tensor) -> Side:
    """Check δ, and return the side with it, in the batch shape of the factor."""
    if side.rows is not WHOLE:
        rule = "diagonal must be None where the factor is sharded on its rows"
        _check.fail_type(function, f"{rule}; got a {type(diagonal).__name__}; take .full_tensor() of the factor")
    basis, diagonal = side.basis, side.data(function, "diagonal", diagonal, "lowrank")
    if diagonal.shape not in (basis.shape[-2:-1], basis.shape[:-1]):
        rule = f"diagonal must have shape ({basis.shape[-2]},) or {tuple(basis.shape[:-1])}, the batch shape and n"
        _check.fail_value(function, f"{rule}; got {tuple(diagonal.shape)}")
    # Each entry is a number beside a row of the basis.
    _check.scalar(function, "diagonal", diagonal, "the factor", basis[..., None])
    return side._replace(diagonal=diagonal.expand(basis.shape[:-1]))
