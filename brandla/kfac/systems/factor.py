"""One Kronecker factor, how it is kept, and many factors fed and solved together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor

from brandla import _check, grouped
from brandla.damped import LowRank, damped_solve
from brandla.kfac.schedule import Schedule, at, spelled
from brandla.kfac.values import Damping, Now
from brandla.lowrank import LowRankEigh, LowRankRoot, Tracked
from brandla_kernels import gram_ema_

State = dict[str, Tensor | int]
_OWN_SOLVE = "a form whose lowrank() is None has largest() and damped_solve() of its own"
# Parts of states whose last dimensions are the rank, which may change from step to step.
_RANKED = {"eigenvalues": 1, "eigenvectors": 1, "root": 1, "gram": 2}


class Absorption(NamedTuple):
    """Columns (*groups, n, k) for the factor of a state, all 0 unless ``finite``; (k,) indices for a diagonal one.

    They go into an exponential sum: S ← decay · S + weight · A Aᵀ.
    """

    state: State
    columns: Tensor
    decay: float
    weight: float
    finite: Tensor


@dataclass(frozen=True, kw_only=True)
class FactorForm(ABC):
    """How a Kronecker factor M is kept: started, fed, refreshed and solved with.

    A dense sum S in a state is M times ``state["total"]``, the sum of the weights; all else is that of M.

    Parameters
    ----------
    tail
        τ of the damped inverse: a number >= 0, ``"smallest"`` (spectrum continuation), or ``"mean"``, the mean of the
        eigenvalues that are left out, from the trace of M.
    """

    # Parts of a state that only updates and reports read.
    unread: ClassVar[tuple[str, ...]] = ()

    tail: float | Literal["mean", "smallest"] = 0.0

    def __post_init__(self) -> None:
        tail: object = self.tail
        if tail not in ("mean", "smallest") and not (isinstance(tail, (int, float)) and tail >= 0):
            _check.fail_value(type(self).__name__, f"tail must be a number >= 0, 'mean' or 'smallest'; got {tail!r}")

    def __str__(self) -> str:
        return spelled(self)

    @abstractmethod
    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Return the state of factors (*groups, n, n) before any data."""

    @abstractmethod
    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Take new columns into the states of factors of this strategy."""

    @abstractmethod
    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        """Do what falls due at this step besides taking in data; ``seed`` is new at every step and factor."""

    @abstractmethod
    def lowrank(self, state: State) -> LowRankEigh | LowRankRoot | None:
        """Return M in a low-rank form; None where the strategy has a solve of its own."""

    def operand(self, state: State) -> LowRank | None:
        """Return what the damped functions take: M in its low-rank form, with its trace where the tail needs that."""
        lowrank = self.lowrank(state)
        if lowrank is None or self.tail != "mean":
            return lowrank
        trace = tensor(state, "trace")
        tracked: Tracked[Any] = Tracked(cast(Any, lowrank), torch.zeros_like(trace), trace)
        return tracked

    def largest(self, state: State) -> Tensor:
        """Return the largest eigenvalue, shape (*groups,)."""
        lowrank = self.lowrank(state)
        assert lowrank is not None, _OWN_SOLVE
        return lowrank.largest_eigenvalue()

    def damped_solve(self, state: State, block: Tensor, shift: Tensor) -> Tensor:
        """Return (M + λI)⁻¹ times a block (..., n, m)."""
        operand = self.operand(state)
        assert operand is not None, _OWN_SOLVE
        return damped_solve(operand, block, shift, tail=self.tail)

    @abstractmethod
    def error_bound(self, state: State) -> Tensor:
        """Return an upper bound of ‖M − M̂‖₂, shape (*groups,), for reports."""

    def solving(self, state: State) -> State:
        """Return the part of a state that `lowrank`, `largest` and `damped_solve` read."""
        return {name: part for name, part in state.items() if name not in self.unread}

    def substitute(self, n: int) -> tuple[FactorForm, str] | None:
        """Return another strategy and the reason, where this one does not apply to order ``n``."""
        return None


@dataclass(frozen=True, kw_only=True)
class DenseForm(FactorForm):
    """A form that keeps the dense sum S in ``state["dense"]``, and beside it what it makes of that now and then."""

    unread: ClassVar[tuple[str, ...]] = ("dense",)

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Begin with a zero matrix."""
        return {"dense": torch.zeros(*groups, n, n, dtype=dtype, device=device)}

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Add the columns to the dense sums."""
        for state, columns, decay, weight, _ in absorptions:
            gram_ema_(tensor(state, "dense"), columns, decay, weight)

    def error_bound(self, state: State) -> Tensor:
        """‖M − M̂‖_F >= ‖M − M̂‖₂ for M as it is now."""
        lowrank = self.lowrank(state)
        assert lowrank is not None, _OWN_SOLVE
        return self.distance(state, lowrank.dense())

    def average(self, state: State) -> Tensor:
        """Return M = S / total."""
        return normalised(state, tensor(state, "dense"))

    def distance(self, state: State, approximation: Tensor) -> Tensor:
        """Return ‖M − M̂‖_F for a dense M̂."""
        norm: Tensor = torch.linalg.matrix_norm(self.average(state) - approximation)
        return norm

    def keep_trace(self, state: State) -> None:
        """Keep the trace of M, where the tail comes from it."""
        if self.tail == "mean":
            state["trace"] = normalised(state, tensor(state, "dense").diagonal(dim1=-2, dim2=-1).sum(-1))


@dataclass
class Factor:
    """One Kronecker factor M, or a batch of them: the strategy it got, why if not the one asked for, and its state."""

    n: int
    groups: tuple[int, ...]
    asked: FactorForm
    dtype: torch.dtype
    device: torch.device
    strategy: FactorForm = field(init=False)
    reason: str = ""
    state: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.strategy = self.asked

    @property
    def started(self) -> bool:
        """Whether the factor holds data."""
        return bool(self.state)

    def choose(self) -> None:
        """Choose the strategy."""
        replacement = self.asked.substitute(self.n)
        if replacement is not None:
            self.strategy, self.reason = replacement

    def begin(self) -> None:
        """Choose the strategy, and the state before any data."""
        self.choose()
        self.state = self._fresh()

    def outline(self) -> Iterable[Tensor]:
        """Return tensors of the shapes that the state begins with, and no memory of their own."""
        state = self.strategy.start(self.n, self.groups, self.dtype, torch.device("meta"))
        return (part for part in state.values() if isinstance(part, Tensor))

    @property
    def rank(self) -> int | None:
        """The columns of what `lowrank` returns, and None where that is None."""
        return next((cast(Tensor, part).shape[-1] for name, part in self.state.items() if name in _RANKED), None)

    def operand(self) -> LowRank | None:
        """Return M as the damped functions take it, or None."""
        return self.strategy.operand(self.state)

    def largest(self) -> Tensor:
        """Return d₁."""
        return self.strategy.largest(self.state)

    def shift(self, damping: Damping) -> Tensor:
        """Return λ."""
        return damping.of(self.largest())

    def damped_solve(self, block: Tensor, damping: Damping) -> Tensor:
        """Return (M + λI)⁻¹ times a block (..., n, m)."""
        return self.strategy.damped_solve(self.state, block, self.shift(damping))

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-equal continuation needs."""
        state = {name: part.clone() if isinstance(part, Tensor) else part for name, part in self.state.items()}
        return {"strategy": str(self.strategy), "reason": self.reason, "state": state}

    def loaded(self, saved: dict[str, Any], where: str) -> Factor:
        """Return a new factor that continues from ``saved``, or raise ValueError."""
        fresh = replace(self, reason=saved["reason"], state={})
        if saved["state"]:
            fresh.strategy = self._strategy_named(saved["strategy"], where)
            fresh.state = _loaded_state(fresh._fresh(), saved["state"], where)
        return fresh

    def _fresh(self) -> State:
        state = self.strategy.start(self.n, self.groups, self.dtype, self.device)
        # No less than tiny ever: S, which is 0 as well then, is divided by it.
        state["total"] = torch.full((), torch.finfo(self.dtype).tiny, dtype=self.dtype, device=self.device)
        if self.strategy.tail == "mean":
            state.setdefault("trace", torch.zeros(self.groups, dtype=self.dtype, device=self.device))
        return state

    def _strategy_named(self, name: str, where: str) -> FactorForm:
        """Find the strategy that was saved: the one asked for, or one it gives way to."""
        candidates = [self.asked]
        replacement = self.asked.substitute(self.n)
        if replacement is not None:
            candidates.append(replacement[0])
        for candidate in candidates:
            if str(candidate) == name:
                return candidate
        rule = f"the strategy must be {candidates[0]}, as in this preconditioner"
        _check.fail_value("KFAC.load_state_dict", f"{where}: {rule}; the state has {name}")


def _loaded_state(fresh: State, saved: dict[str, Any], where: str) -> State:
    for name, part in saved.items():
        template = fresh.get(name)
        if not isinstance(part, Tensor):
            fresh[name] = part
            continue
        if not isinstance(template, Tensor) or _fixed_shape(name, template) != _fixed_shape(name, part):
            wanted = tuple(template.shape) if isinstance(template, Tensor) else "nothing"
            rule = f"{where}: {name} must have shape {wanted}; got {tuple(part.shape)}"
            _check.fail_value("KFAC.load_state_dict", rule)
        fresh[name] = part.to(device=template.device, dtype=template.dtype, copy=True)
    return fresh


def _fixed_shape(name: str, part: Tensor) -> tuple[int, ...]:
    """Return the dimensions that do not depend on the rank, and their number."""
    return *part.shape[: part.ndim - _RANKED.get(name, 0)], part.ndim


class Intake(NamedTuple):
    """Columns for a factor, and the scale s of the sum s · A Aᵀ that they stand for."""

    factor: Factor
    columns: Tensor
    scale: float


def absorb_columns(intakes: Iterable[Intake], now: Now) -> None:
    """Take columns into factors, those of one strategy together, and refresh each.

    A batch that is not finite, its columns all 0, leaves M = S / total as it is: both decay alike. A factor that gets
    no columns belongs to another process, and is left as it is.
    """
    members: dict[FactorForm, list[Absorption]] = {}
    factors = {}
    totals = _Totals(now)
    for index, (factor, columns, scale) in enumerate(intakes):
        if not columns.shape[-1]:
            continue
        if not factor.started:
            factor.begin()
            totals.begin(factor)
        totals.renew(factor)
        # In the weight, the normalisation costs no scaled copy of the columns.
        weight = (1 - now.decay) * scale
        members.setdefault(factor.strategy, []).append(Absorption(factor.state, columns, now.decay, weight, now.finite))
        factors[index] = factor
    for strategy, absorptions in members.items():
        strategy.take(absorptions, now.step)
    for index, factor in factors.items():
        factor.strategy.refresh(factor.state, now.step, now.seed + index, now.damping)


class _Totals:
    """The sums of weights of a step: factors that began together have one tensor, which is computed once."""

    def __init__(self, now: Now) -> None:
        self._now = now
        self._first: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        # By the identity of the old one, which is kept here so that no other tensor can get it.
        self._renewed: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, factor: Factor) -> None:
        """Give a new factor the sum that others begin with."""
        factor.state["total"] = self._first.setdefault((factor.dtype, factor.device), tensor(factor.state, "total"))

    def renew(self, factor: Factor) -> None:
        """Decay the sum of a factor and add this step's weight, which is 0 unless the step is finite."""
        old = tensor(factor.state, "total")
        if id(old) not in self._renewed:
            decay, finite = self._now.decay, self._now.finite.to(old.dtype)
            new = torch.add(decay * old, finite, alpha=1 - decay).clamp_min(torch.finfo(old.dtype).tiny)
            self._renewed[id(old)] = old, new
        factor.state["total"] = self._renewed[id(old)][1]


def share_totals(factors: Iterable[Factor]) -> None:
    """Give factors of one sum of weights one tensor for it, as those have that began together; reads them back."""
    known: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
    for factor in factors:
        if factor.started:
            total = tensor(factor.state, "total")
            factor.state["total"] = known.setdefault((total.item(), total.dtype, total.device), total)


def tensor(state: State, name: str) -> Tensor:
    """Read a tensor of a state."""
    return cast(Tensor, state[name])


def normalised(state: State, sums: Tensor) -> Tensor:
    """Return S / total."""
    return sums / tensor(state, "total")


def stored(state: State) -> LowRankEigh:
    """Read a decomposition as it was stored."""
    return LowRankEigh(tensor(state, "eigenvalues"), tensor(state, "eigenvectors"))


def store(state: State, lowrank: LowRankEigh | LowRankRoot) -> None:
    """Write a low-rank form, each part under its own name."""
    state.update(lowrank._asdict())


def damped_solves(factors: Sequence[Factor], blocks: Sequence[Tensor], damping: Damping) -> list[Tensor]:
    """Return (M + λI)⁻¹ times a block (..., n, m) for each factor, those that are low-rank together."""
    lowranks = {index: known for index, own in enumerate(factors) if (known := own.operand()) is not None}
    solved = {
        index: own.damped_solve(block, damping)
        for index, (own, block) in enumerate(zip(factors, blocks, strict=True))
        if index not in lowranks
    }
    if lowranks:
        shifts = damping.of_each([factors[index].largest() for index in lowranks])
        tails = [factors[index].strategy.tail for index in lowranks]
        known_blocks = [blocks[index] for index in lowranks]
        together = grouped.damped_solve(list(lowranks.values()), known_blocks, shifts, tail=tails)
        solved |= dict(zip(lowranks, together, strict=True))
    return [solved[index] for index in range(len(factors))]


def due(state: State, step: int, every: Schedule[int]) -> bool:
    """Say whether ``every`` steps have passed since the last time this returned True for the state."""
    last = state.get("renewed")
    if isinstance(last, int) and step - last < at(every, step):
        return False
    state["renewed"] = step
    return True
