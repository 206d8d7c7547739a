"""One Kronecker factor, and many of them fed and solved together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from brandla import _check, grouped
from brandla.damped import LowRank
from brandla.kfac.systems.form import Absorption, FactorForm, State, copied
from brandla.kfac.values import Damping, Now, alike

# Parts of states whose last dimensions are the rank, which may change from step to step.
_RANKED = {"eigenvalues": 1, "eigenvectors": 1, "root": 1, "gram": 2}


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
        return bool(self.state)

    def choose(self) -> None:
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

    def tensors(self) -> Iterator[Tensor]:
        """Go through all that is kept."""
        return (part for part in self.state.values() if isinstance(part, Tensor))

    @property
    def rank(self) -> int | None:
        """The columns of what `lowrank` returns, and None where that is None."""
        for name in _RANKED:
            if name in self.state:
                columns: int = self.state[name].shape[-1]
                return columns
        return None

    def operand(self) -> LowRank | None:
        """Return M as the damped functions take it, or None."""
        return self.strategy.operand(self.state)

    def largest(self) -> Tensor:
        """Return d₁."""
        return self.strategy.largest(self.state)

    def shift(self, damping: Damping) -> Tensor:
        """Return λ."""
        return damping.of(self.largest())

    def state_dict(self) -> dict[str, Any]:
        return {"strategy": str(self.strategy), "reason": self.reason, "state": copied(self.state)}

    def loaded(self, saved: dict[str, Any], where: str) -> Factor:
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
        replacement = self.asked.substitute(self.n)
        candidates = [self.asked] if replacement is None else [self.asked, replacement[0]]
        for candidate in candidates:
            if str(candidate) == name:
                return candidate
        rule = f"the strategy must be {self.asked}, as in this preconditioner"
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


# Columns for a factor, and the scale s of the sum s · A Aᵀ that they stand for.
Intake: TypeAlias = tuple[Factor, Tensor, float]


def absorb_columns(intakes: Iterable[Intake], now: Now) -> None:
    """Take columns into factors, those of one strategy together, and refresh each.

    A batch that is not finite, its columns all 0, leaves M = S / total as it is: both decay alike. A factor that gets
    no columns belongs to another process, and is left as it is. Factors that began together have one tensor for the sum
    of their weights, which is computed once.
    """
    members: dict[FactorForm, list[Absorption]] = {}
    factors = {}
    first: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    # By the identity of the old sum, which is kept here so that no other tensor can get it.
    renewed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for index, (factor, columns, scale) in enumerate(intakes):
        if not columns.shape[-1]:
            continue
        if not factor.state:
            factor.begin()
            factor.state["total"] = first.setdefault((factor.dtype, factor.device), factor.state["total"])
        total = factor.state["total"]
        if id(total) not in renewed:
            renewed[id(total)] = total, *_renewed(total, now)
        _, decayed, factor.state["total"] = renewed[id(total)]
        # In the weight, the normalisation costs no scaled copy of the columns.
        weight = (1 - now.decay) * scale
        absorption = Absorption(factor.state, columns, now.decay, weight, now.finite, decayed)
        members.setdefault(factor.strategy, []).append(absorption)
        factors[index] = factor
    for strategy, absorptions in members.items():
        strategy.take(absorptions, now.step)
    for index, factor in factors.items():
        factor.strategy.refresh(factor.state, now.step, now.seed + index, now.damping)


def _renewed(total: Tensor, now: Now) -> tuple[Tensor, Tensor]:
    """Return the decayed sum of weights, and with this step's weight, which is 0 unless the step is finite."""
    decayed = now.decay * total
    return decayed, torch.add(decayed, now.finite, alpha=1 - now.decay).clamp_min_(torch.finfo(total.dtype).tiny)


def share_totals(factors: Iterable[Factor]) -> None:
    """Give factors of one sum of weights one tensor for it, as those have that began together; reads them back."""
    known: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
    for factor in factors:
        if factor.started:
            total = factor.state["total"]
            factor.state["total"] = known.setdefault((total.item(), total.dtype, total.device), total)


def shifts_of_each(factors: Sequence[Factor], damping: Damping) -> list[Tensor]:
    """Return λ for each factor."""

    def largest(members: list[Factor]) -> list[Tensor]:
        return members[0].strategy.largest_of_each([own.state for own in members])

    return damping.of_each(alike(factors, lambda own: own.strategy, largest))


def damped_solves(factors: Sequence[Factor], blocks: Sequence[Tensor], damping: Damping) -> list[Tensor]:
    """Return (M + λI)⁻¹ times a block (..., n, m) for each factor, those that are low-rank or of one form together."""

    def by_form(members: list[int]) -> list[Tensor]:
        states, own, shift = zip(
            *((factors[index].state, blocks[index], shifts[index]) for index in members), strict=True
        )
        return factors[members[0]].strategy.damped_solve_of_each(states, own, shift)

    shifts = shifts_of_each(factors, damping)
    lowranks = {index: known for index, own in enumerate(factors) if (known := own.operand()) is not None}
    others = [index for index in range(len(factors)) if index not in lowranks]
    solved = dict(zip(others, alike(others, lambda index: factors[index].strategy, by_form), strict=True))
    if lowranks:
        tails = [factors[index].strategy.tail for index in lowranks]
        known_blocks, known_shifts = [blocks[index] for index in lowranks], [shifts[index] for index in lowranks]
        together = grouped.damped_solve(list(lowranks.values()), known_blocks, known_shifts, tail=tails)
        solved |= dict(zip(lowranks, together, strict=True))
    return [solved[index] for index in range(len(factors))]
