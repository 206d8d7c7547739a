"""One Kronecker factor, and many of them fed and solved together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from brandla import _check, grouped
from brandla.damped import LowRank
from brandla.kfac.systems.form import Absorption, FactorForm, State, restored, tensors_of
from brandla.kfac.values import Damping, Now, Shape, alike, by_kind

# Parts of states whose last dimensions are the rank, which may change from step to step.
_RANKED = {"eigenvalues": 1, "eigenvectors": 1, "root": 1, "gram": 2}


@dataclass
class Factor:
    """One Kronecker factor M, or a batch of them: the strategy it got, why if not the one asked for, and its state."""

    n: int
    shape: Shape
    asked: FactorForm
    strategy: FactorForm = field(init=False)
    reason: str = field(init=False)
    state: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.strategy, self.reason = self.asked.substitute(self.n) or (self.asked, "")

    @property
    def started(self) -> bool:
        return bool(self.state)

    def begin(self) -> None:
        groups, dtype, device = self.shape.groups, self.shape.dtype, self.shape.device
        self.state = self.strategy.start(self.n, groups, dtype, device)
        # No less than tiny ever: S, which is 0 as well then, is divided by it.
        self.state["total"] = torch.full((), torch.finfo(dtype).tiny, dtype=dtype, device=device)
        if self.strategy.tail == "mean":
            self.state.setdefault("trace", torch.zeros(groups, dtype=dtype, device=device))

    def outline(self) -> Iterable[Tensor]:
        """Return tensors of the shapes that the state begins with, and no memory of their own."""
        return tensors_of(self.strategy.start(self.n, self.shape.groups, self.shape.dtype, torch.device("meta")))

    def tensors(self) -> Iterable[Tensor]:
        return tensors_of(self.state)

    @property
    def rank(self) -> int | None:
        """The columns of what `lowrank` returns, and None where that is None."""
        for name in _RANKED:
            if name in self.state:
                columns: int = self.state[name].shape[-1]
                return columns
        return None

    def operand(self) -> LowRank | None:
        return self.strategy.operand(self.state)

    def largest(self) -> Tensor:
        return self.strategy.largest_of_each([self.state])[0]

    def parts(self) -> State:
        return {"strategy": str(self.strategy), "reason": self.reason, "state": self.state}

    def loaded(self, saved: dict[str, Any], where: str) -> Factor:
        fresh = replace(self, state={})
        if not saved["state"]:
            return fresh
        fresh.begin()
        if str(fresh.strategy) != saved["strategy"]:
            rule = f"the strategy must be {self.asked}, as in this preconditioner"
            _check.fail_value("KFAC.load_state_dict", f"{where}: {rule}; the state has {saved['strategy']}")
        own = {
            name: restored(part, fresh.state[name], f"{where}: {name}", free=_RANKED.get(name, 0))
            for name, part in saved["state"].items()
            if isinstance(part, Tensor)
        }
        fresh.state |= saved["state"] | own
        return fresh


# Columns for a factor, and the scale s of the sum s · A Aᵀ that they stand for.
Intake: TypeAlias = tuple[Factor, Tensor, float]


def absorb_columns(intakes: Iterable[Intake], now: Now) -> None:
    """Take columns into factors, those of one strategy together, and refresh each.

    A batch that is not finite, its columns all 0, leaves M = S / total as it is: both decay alike. A factor that gets
    no columns belongs to another process, and is left as it is. Factors that began together have one tensor for the sum
    of their weights, which is computed once.
    """
    absorptions: list[Absorption] = []
    factors = {}
    first: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    # By the identity of the old sum, which is kept here so that no other tensor can get it.
    totals: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for index, (factor, columns, scale) in enumerate(intakes):
        if not columns.shape[-1]:
            continue
        if not factor.state:
            factor.begin()
            factor.state["total"] = first.setdefault((factor.shape.dtype, factor.shape.device), factor.state["total"])
        before = factor.state["total"]
        if id(before) not in totals:
            decayed = now.decay * before
            # The weight of this step is 0 unless the step is finite.
            after = torch.add(decayed, now.finite, alpha=1 - now.decay).clamp_min_(torch.finfo(before.dtype).tiny)
            totals[id(before)] = before, decayed, after
        _, decayed, factor.state["total"] = totals[id(before)]
        # In the weight, the normalisation costs no scaled copy of the columns.
        absorptions.append(Absorption(factor.state, columns, (1 - now.decay) * scale, decayed))
        factors[index] = factor
    strategies = [factor.strategy for factor in factors.values()]
    for members in by_kind(zip(strategies, absorptions, strict=True), strategies):
        members[0][0].take([absorption for _, absorption in members], now)
    for index, factor in factors.items():
        factor.strategy.refresh(factor.state, now.step, now.seed + index, now.damping)


def share_totals(factors: Iterable[Factor]) -> None:
    """Give factors of one sum of weights one tensor for it, as those have that began together; reads them back."""
    known: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
    for factor in factors:
        if factor.started:
            total = factor.state["total"]
            factor.state["total"] = known.setdefault((total.item(), total.dtype, total.device), total)


def shifts_of_each(factors: Sequence[Factor], damping: Damping) -> list[Tensor]:
    """Return λ for each factor."""
    largest = alike(
        factors,
        attrgetter("strategy"),
        lambda members: members[0].strategy.largest_of_each([own.state for own in members]),
    )
    return damping.of_each(largest)


def damped_solves(factors: Sequence[Factor | None], blocks: Sequence[Tensor], damping: Damping) -> list[Tensor]:
    """Return (M + λI)⁻¹ times a block (..., n, m) for each factor, those that are low-rank or of one form together.

    None stands for I, undamped.
    """

    def together(members: list[tuple[Factor, LowRank | None, Tensor, Tensor]]) -> Sequence[Tensor]:
        if members[0][1] is None:
            problems = [(factor.state, block, shift) for factor, _, block, shift in members]
            return members[0][0].strategy.damped_solve_of_each(problems)
        own, operands, right, shifts = (list(part) for part in zip(*members, strict=True))
        return grouped.damped_solve(operands, right, shifts, tail=[factor.strategy.tail for factor in own])

    known = [own for own in factors if own is not None]
    operands = [own.operand() for own in known]
    right = [block for own, block in zip(factors, blocks, strict=True) if own is not None]
    problems = list(zip(known, operands, right, shifts_of_each(known, damping), strict=True))
    solved = iter(alike(problems, lambda own: own[0].strategy if own[1] is None else None, together))
    return [block if own is None else next(solved) for own, block in zip(factors, blocks, strict=True)]
