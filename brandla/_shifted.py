"""A low-rank factor with its damping λ and tail τ, in the form in which the ops apply it: ``docs/damped.md``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import brandla_kernels as ops
from brandla import _check
from brandla._sharded import PLAIN, UNSHARDED, Sharding, sharding_of
from brandla._small import Spectrum, noise_level, safe_eigh, spectrum
from brandla.lowrank import LowRankEigh, LowRankRoot, Number, Tracked, add_dims, as_tensors, check_factor, stack_numbers
from brandla.orthonormal import times
from brandla_kernels import Tall, tall

Factor = LowRankEigh | LowRankRoot
LowRank = Factor | Tracked[LowRankEigh] | Tracked[LowRankRoot]
Tail = Number | Literal["mean", "smallest"]


class Shifted(NamedTuple):
    """The operator β (I + U Z Uᵀ) of one factor, of a batch, or of a list of factors with Z and β stacked."""

    basis: Tall  # U
    middle: Tensor  # Z: [..., r] if diagonal, else [..., r, r]
    scale: Tensor  # β: batch shape

    def __matmul__(self, rhs: Tall) -> Tall:
        return ops.damped_apply(*broadcast_parts(self, rhs))

    def apply(self, rhs: Tall, sharding: Sharding) -> Any:
        """Return the product with a right-hand side, of which this process holds the rows of ``sharding``."""
        if sharding is UNSHARDED:
            return self @ rhs
        basis, middle, scale, rhs = broadcast_parts(self, rhs)
        middle, scale = sharding.summing_gradients(middle), sharding.summing_gradients(scale)
        coefficients = sharding.total(ops.project(basis, rhs))
        inner = middle[..., None] * coefficients if middle.ndim < basis.ndim else middle @ coefficients
        return scale[..., None, None] * (rhs + basis @ inner)


class Inverse(NamedTuple):
    """The inverse of one factor, a batch or a list, by an op that computes Z and β itself, from d or S."""

    basis: Tall
    small: Tall
    damping: Tensor  # damping and tail have the batch shape
    tail: Tensor

    def __matmul__(self, rhs: Tall) -> Tall:
        return ops.damped_inverse(*broadcast_parts(self, rhs))


def broadcast_parts(*operands: Shifted | Inverse | Tall) -> list[Any]:
    """Return the parts of operators, and tall matrices, as views that are expanded to their common batch shape."""
    groups = [operand if isinstance(operand, tuple) else (operand,) for operand in operands]
    if isinstance(groups[0][0], list) or len({group[0].shape[:-2] for group in groups}) == 1:
        return [*chain.from_iterable(groups)]
    batch = torch.broadcast_shapes(*(group[0].shape[:-2] for group in groups))
    return [part.expand(*batch, *part.shape[group[0].ndim - 2 :]) for group in groups for part in group]


class DampedFactor(NamedTuple):
    """One factor, a batch or a list, with damping and tail. The small parts of a list are a list, or `stacked`."""

    kind: type[Factor]
    small: Tall  # d or S
    basis: Tall  # U or F
    damping: Number
    tail: Number | None  # None stands for "smallest"
    sharding: Sharding  # rows of U or F that this process holds
    diagonal: Tensor | None = None  # δ

    @property
    def is_root(self) -> bool:
        """Whether M̂ = F Fᵀ. Then every eigenvalue up to τ counts as τ."""
        return self.kind is LowRankRoot

    def stacked(self) -> DampedFactor:
        """Return the factor with the small parts of a list stacked. Everything but `inverse` needs them so."""
        return self if isinstance(self.small, Tensor) else self._replace(small=torch.stack(self.small))

    def inverse(self) -> Inverse | None:
        """Return the inverse; None if reads are free, if Z needs eigenvalues of S, or if the rows are sharded."""
        small, basis = self.small, self.basis
        single = isinstance(small, Tensor)
        like = small if single else small[0]
        if self.sharding is not UNSHARDED or ops.reads_are_free(like) or (self.is_root and not _is_zero(self.tail)):
            return None
        tail = _smallest(tall.stacked(small)) if self.tail is None else self.tail
        batch = basis.shape[:-2] if single else (len(basis),)
        return Inverse(basis, small, *as_tensors(self.damping, tail, like.dtype, like.device, batch))

    def operator(self, exponent: float = -1.0) -> Shifted:
        """(M̂ + τ(I − P) + λI)^p = β (I + U Z Uᵀ) with β = (τ + λ)^p and Z = ((d + λ)/(τ + λ))^p − 1.

        For a root, F v has length √d for an eigenvector v of S. So Z is divided by d, and is 0 for every d up to τ.
        For p = −1 and τ = 0, Z is −(S + λI)⁻¹.
        """
        damping, (held, tail) = self.damping, self._spectrum(needed=exponent != -1)
        if held is None:
            return Shifted(self.basis, -ops.damped_gram_inverse(self.small, damping), self._as_batch(1 / damping))

        def middle(values: Tensor) -> Tensor:
            damped = values + add_dims(damping)
            if exponent == -1:
                return self._gap_to_tail(values, tail) / damped
            shift = add_dims(tail + damping)
            if not self.is_root:
                return (damped / shift) ** exponent - 1
            # expm1 and log1p, because the division by a small d would magnify the rounding of a difference.
            part = torch.expm1(exponent * torch.log1p((_at_least(values, tail) - add_dims(tail)) / shift))
            return part / torch.where(values > 0, values, 1)

        inner, shift = held.apply(middle), tail + damping
        scale = self._as_batch(1 / shift) if exponent == -1 else self._as_batch(shift) ** exponent
        return Shifted(self.basis, inner, scale)

    def logdet(self) -> Tensor:
        """Return the log-determinant, the same in every process."""
        if self.diagonal is not None:
            shifts, _, _, core = self._with_diagonal(self.diagonal)
            of_core: Tensor = torch.linalg.slogdet(core).logabsdet
            return shifts.log().sum(-1) + of_core
        values, tail = self.eigenvalues(needed=False)
        if values is None:
            on_span = 2 * ops.damped_cholesky(self.small, self.damping).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        else:
            on_span = (values + add_dims(self.damping)).log().sum(-1)
        return self.sharding.small_result(on_span + self.tail_count() * self._as_batch(tail + self.damping).log())

    def tail_count(self) -> Number:
        """Return n − r, the number of eigenvalues that no column stands for."""
        small, basis = self.small, self.basis
        r: int = small.shape[-1]
        if isinstance(basis, Tensor):
            return self.sharding.count(basis) - r
        return stack_numbers([part.shape[-2] - r for part in basis], small)

    def matching_data(self, function: str, name: str, tensor: Tensor, of_name: str) -> Tensor:
        """Check that a tall argument has the kind, dtype and device of the factor, and return it in its dtype."""
        if self.sharding is not UNSHARDED or type(tensor) is not Tensor:
            self.sharding.check_kind(function, name, tensor)
        return _check.matching_data(function, name, tensor, of_name, self.basis)

    def local_rows(self, function: str, name: str, block: Tensor) -> Tensor:
        """Check that a tall argument's batch shape broadcasts with the factor's, and return the rows held here."""
        _check.batches(function, name, block, self.basis)
        return block if self.sharding is UNSHARDED else self.sharding.local(function, name, block)

    def eigenvalues(self, *, needed: bool = True) -> tuple[Tensor | Any, Number]:
        """Return eigenvalues on the span of U or F, without λ but τ for zero columns, and τ. None as in `_spectrum`."""
        held, tail = self._spectrum(needed)
        if held is None:
            return None, tail
        if self.is_root:
            return _at_least(held.values, tail), tail
        if _is_zero(tail):
            return held.values, tail
        lengths = tall.each(lambda basis: basis.detach().square().sum(-2), self.basis)
        is_zero = self.sharding.total(tall.stacked(lengths)) == 0
        return torch.where(is_zero, add_dims(tail), held.values), tail

    def eigenpairs(self) -> tuple[Tall, tuple[Tensor, Number]]:
        """Return eigenvectors, and what `eigenvalues` does. A root takes a pass over F, and τ for unresolved values."""
        if not self.is_root:
            return self.basis, self.eigenvalues()
        gram = self.small
        values, rotation = safe_eigh((gram + gram.mT) / 2)
        tail = _smallest(values) if self.tail is None else self.tail
        noise = noise_level(gram.dtype, gram.shape[-1]) * values[..., :1]
        dropped = (values <= noise) | (values <= add_dims(tail))
        scale = torch.where(dropped, 1, values).rsqrt()
        rotation = torch.where(dropped[..., None, :], 0, rotation * scale[..., None, :])
        return times(self.basis, rotation), (torch.where(dropped, add_dims(tail), values), tail)

    def solve_with_diagonal(self, diagonal: Tensor, rhs: Tensor) -> Tensor:
        """Return (M̂ + τ(I − P) + λI + diag(δ))⁻¹ V = D^−½ (I − B̂ C K⁻¹ B̂ᵀ) D^−½ V."""
        shifts, scaled_basis, weights, core = self._with_diagonal(diagonal)
        scale = shifts.rsqrt()[..., None]
        middle, _ = torch.linalg.solve_ex(core, weights, left=False)
        one = shifts.new_ones(()).expand(scaled_basis.shape[:-2])
        solution: Tensor = Shifted(scaled_basis, -middle, one) @ (scale * rhs)
        return scale * solution

    def _with_diagonal(self, diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the diagonal of D, B̂ = D^−½ B, C and the core K = I + B̂ᵀB̂ C of the operator D + B C Bᵀ.

        D is diag(λ + τ + δ), B is U or F, and C is diag(d − τ), divided by d for a root.
        """
        basis, (held, tail) = self.basis, self._spectrum()
        if held is None:
            weights = torch.ones_like(self.small[..., 0])
        else:
            weights = -held.apply(lambda values: self._gap_to_tail(values, tail))
        weights = weights if weights.ndim == basis.ndim else torch.diag_embed(weights)
        shifts = add_dims(tail + self.damping) + diagonal
        scaled_basis = shifts.rsqrt()[..., None] * basis
        identity = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
        return shifts, scaled_basis, weights, identity + ops.project(scaled_basis, scaled_basis) @ weights

    def _gap_to_tail(self, values: Tensor, tail: Number) -> Tensor:
        """Return τ − d, or min(τ − d, 0)/d for a root."""
        if not self.is_root:
            return add_dims(tail) - values
        return (add_dims(tail) - _at_least(values, tail)) / torch.where(values > 0, values, 1)

    def _spectrum(self, needed: bool = False) -> tuple[Spectrum | Any, Number]:
        """Return the spectrum of diag(d) or of S, and τ.

        The spectrum is None if S would have to be decomposed, τ is the number 0, and the caller does not need it.
        """
        small, held = self.small, None
        if not self.is_root:
            held = Spectrum(small)
        elif ops.reads_are_free(small) and not small.requires_grad:
            # `root_update` by "eigh" leaves S diagonal.
            diagonal = small.diagonal(dim1=-2, dim2=-1)
            held = Spectrum(diagonal) if torch.equal(small, torch.diag_embed(diagonal)) else None
        if held is None and _is_zero(self.tail) and not needed:
            return None, 0.0
        held = spectrum((small + small.mT) / 2) if held is None else held
        return held, _smallest(held.values) if self.tail is None else self.tail

    def _as_batch(self, value: Number) -> Tensor:
        """Return a number as a tensor of the factor's batch shape."""
        batch = self.small.shape[: -2 if self.is_root else -1]
        if isinstance(value, Tensor):
            return value if value.shape == batch else value.expand(batch)
        return torch.full(batch, value, dtype=self.small.dtype, device=self.small.device)


def join(factors: Sequence[DampedFactor]) -> DampedFactor:
    """Return all ``factors``, which share kind and rank, as one with a list of tall matrices."""
    kinds, smalls, bases, dampings, tails, *_ = zip(*factors, strict=True)
    like = smalls[0]
    tail = None if tails[0] is None else stack_numbers(tails, like)
    return DampedFactor(kinds[0], list(smalls), list(bases), stack_numbers(dampings, like), tail, UNSHARDED)


def _at_least(values: Tensor, tail: Number) -> Tensor:
    """Return max(d, τ), with the derivative of τ where both are equal. NaN stays NaN."""
    return torch.where(values <= add_dims(tail), add_dims(tail), values)


def _is_zero(tail: Number | None) -> bool:
    """Return whether τ is the number 0. A tensor never counts as 0, because its value is not read."""
    return isinstance(tail, float) and tail == 0


def _smallest(values: Tensor) -> Tensor:
    return values.amin(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])


def check_damped_factor(
    function: str, lowrank: LowRank, damping: Number, tail: Tail, side: str = "", diagonal: Tensor | None = None
) -> DampedFactor:
    """Check a factor, tracked or not, with λ, τ and perhaps δ, and return the parts of them that are held here."""
    factor: Factor = lowrank.lowrank if isinstance(lowrank, Tracked) else lowrank
    name, prefix = (side, f"{side}_") if side else ("lowrank", "")
    damping_name, tail_name = f"{prefix}damping", f"{prefix}tail"
    small, basis = check_factor(function, name, factor)
    small_name, basis_name = factor._fields[::-1] if isinstance(factor, LowRankRoot) else factor._fields
    sharding = UNSHARDED if type(basis) is Tensor else sharding_of(function, f"{name}.{basis_name}", basis, small)
    if sharding is not UNSHARDED or not PLAIN.issuperset(map(type, (small, damping, tail))):
        small = sharding.local_small(function, f"{name}.{small_name}", small)
        damping = sharding.local_small(function, damping_name, damping)
        tail = tail if isinstance(tail, str) else sharding.local_small(function, tail_name, tail)
    damping = _check.scalar(function, damping_name, damping, "the factor", basis, positive=True)
    if isinstance(tail, str):
        tail_value = _named_tail(function, tail_name, tail, lowrank, basis, sharding)
    else:
        tail_value = _check.scalar(function, tail_name, tail, "the factor", basis)
    if sharding is not UNSHARDED:
        basis = sharding.local(function, f"{name}.{basis_name}", basis)
    checked = DampedFactor(type(factor), small, basis, damping, tail_value, sharding)
    return checked if diagonal is None else _add_diagonal(function, checked, diagonal)


def _named_tail(
    function: str, name: str, tail: str, lowrank: LowRank, basis: Tensor, sharding: Sharding
) -> Number | None:
    if tail == "smallest":
        return None
    if tail != "mean":
        _check.fail_value(function, f"{name} must be a number, a tensor, 'mean' or 'smallest'; got {tail!r}")
    if not isinstance(lowrank, Tracked):
        rule = f"{name}='mean' needs a Tracked factor, which carries the trace"
        _check.fail_value(function, f"{rule}; got a {type(lowrank).__name__}; start the stream with brandla.track")
    factor: Factor = lowrank.lowrank
    _check.tracked(function, "trace", lowrank.trace, "the factor", basis)
    trace, held = (sharding.local_small(function, "trace", part) for part in (lowrank.trace, factor.trace()))
    # The mean of the eigenvalues left out is (tr M − tr M̂)/(n − r). It and its derivative are 0 unless tr M > tr M̂.
    left_out = torch.nn.functional.threshold(trace - held, 0, 0)
    return left_out / max(factor.n - factor.rank, 1) * (factor.n > factor.rank)


def _add_diagonal(function: str, factor: DampedFactor, diagonal: Tensor) -> DampedFactor:
    """Check δ, expand it to the batch shape of the factor, and return the factor with it."""
    if factor.sharding is not UNSHARDED:
        rule = "diagonal must be None if the factor is sharded on its rows"
        _check.fail_type(function, f"{rule}; got a {type(diagonal).__name__}; take .full_tensor() of the factor")
    basis, diagonal = factor.basis, factor.matching_data(function, "diagonal", diagonal, "lowrank")
    if diagonal.shape not in (basis.shape[-2:-1], basis.shape[:-1]):
        rule = f"diagonal must have shape ({basis.shape[-2]},) or {tuple(basis.shape[:-1])}, the batch shape and n"
        _check.fail_value(function, f"{rule}; got {tuple(diagonal.shape)}")
    # The rows of the basis count as a batch dimension here, so that every entry of δ is checked as a number.
    _check.scalar(function, "diagonal", diagonal, "the factor", basis[..., None])
    return factor._replace(diagonal=diagonal.expand(basis.shape[:-1]))
