"""One Kronecker factor, and functions that update and solve with many factors together."""

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
from brandla.kfac.values import Damping, Now, Shape, by_kind, map_by_kind

# Parts of states, with the number of last dimensions that are the rank, which may change from step to step.
_RANKED = {"eigenvalues": 1, "eigenvectors": 1, "root": 1, "gram": 2}


@dataclass
class Factor:
    """One Kronecker factor M, or a batch of them: its form, the reason if another form was requested, and its state."""

    n: int
    shape: Shape
    requested: FactorForm
    form: FactorForm = field(init=False)
    reason: str = field(init=False)
    state: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.form, self.reason = self.requested.substitute(self.n) or (self.requested, "")

    @property
    def started(self) -> bool:
        return bool(self.state)

    def begin(self) -> None:
        groups, dtype, device = self.shape.groups, self.shape.dtype, self.shape.device
        self.state = self.form.start(self.n, groups, dtype, device)
        # The total is at least tiny, because S is divided by it even before any finite data, when S is 0.
        self.state["total"] = torch.full((), torch.finfo(dtype).tiny, dtype=dtype, device=device)
        if self.form.tail == "mean":
            self.state.setdefault("trace", torch.zeros(groups, dtype=dtype, device=device))

    def outline(self) -> Iterable[Tensor]:
        """Return the tensors of a state before any data, on the meta device, which takes no memory."""
        return tensors_of(self.form.start(self.n, self.shape.groups, self.shape.dtype, torch.device("meta")))

    def tensors(self) -> Iterable[Tensor]:
        return tensors_of(self.state)

    @property
    def rank(self) -> int | None:
        """The number of columns of the low-rank form, or None without one."""
        for name in _RANKED:
            if name in self.state:
                columns: int = self.state[name].shape[-1]
                return columns
        return None

    def operand(self) -> LowRank | None:
        return self.form.operand(self.state)

    def largest(self) -> Tensor:
        return self.form.largest_of_each([self.state])[0]

    def parts(self) -> State:
        return {"strategy": str(self.form), "reason": self.reason, "state": self.state}

    def loaded(self, saved: dict[str, Any], where: str) -> Factor:
        fresh = replace(self, state={})
        if not saved["state"]:
            return fresh
        fresh.begin()
        if str(fresh.form) != saved["strategy"]:
            rule = f"the strategy must be {self.requested}, as in this preconditioner"
            _check.fail_value("KFAC.load_state_dict", f"{where}: {rule}; the state has {saved['strategy']}")
        tensors = {
            name: restored(part, fresh.state[name], f"{where}: {name}", free=_RANKED.get(name, 0))
            for name, part in saved["state"].items()
            if isinstance(part, Tensor)
        }
        fresh.state |= saved["state"] | tensors
        return fresh


# A factor, its new columns A, and the scale s of its new data s · A Aᵀ.
Intake: TypeAlias = tuple[Factor, Tensor, float]


def absorb_columns(intakes: Iterable[Intake], now: Now) -> None:
    """Absorb columns into factors, together for all factors of one form, and refresh each factor.

    A non-finite batch has columns of 0. It leaves M = S / total unchanged, because S and total decay alike. A factor
    without columns belongs to another process and stays unchanged. Factors that began together share one tensor
    for the total of their weights, which is computed once.
    """
    absorptions: list[Absorption] = []
    factors = {}
    first_totals: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    # Keys are the ids of old totals. The values hold the old totals too, so that no id is reused.
    totals: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for index, (factor, columns, scale) in enumerate(intakes):
        if not columns.shape[-1]:
            continue
        if not factor.state:
            factor.begin()
            factor.state["total"] = first_totals.setdefault(
                (factor.shape.dtype, factor.shape.device), factor.state["total"]
            )
        before = factor.state["total"]
        if id(before) not in totals:
            decayed = now.decay * before
            # A non-finite step has the weight 0.
            after = torch.add(decayed, now.finite, alpha=1 - now.decay).clamp_min_(torch.finfo(before.dtype).tiny)
            totals[id(before)] = before, decayed, after
        _, decayed, factor.state["total"] = totals[id(before)]
        # The scale goes into the weight, which saves a scaled copy of the columns.
        absorptions.append(Absorption(factor.state, columns, (1 - now.decay) * scale, decayed))
        factors[index] = factor
    forms = [factor.form for factor in factors.values()]
    for members in by_kind(zip(forms, absorptions, strict=True), forms):
        members[0][0].take([absorption for _, absorption in members], now)
    for index, factor in factors.items():
        factor.form.refresh(factor.state, now.step, now.seed + index, now.damping)


def share_totals(factors: Iterable[Factor]) -> None:
    """Let factors with equal totals share one tensor, like factors that began together. This reads the totals back."""
    shared: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
    for factor in factors:
        if factor.started:
            total = factor.state["total"]
            factor.state["total"] = shared.setdefault((total.item(), total.dtype, total.device), total)


def dampings_of_each(factors: Sequence[Factor], damping: Damping) -> list[Tensor]:
    """Return λ for each factor."""

    def largest(members: list[Factor]) -> list[Tensor]:
        return members[0].form.largest_of_each([factor.state for factor in members])

    return damping.of_each(map_by_kind(factors, attrgetter("form"), largest))


def damped_solves(factors: Sequence[Factor | None], blocks: Sequence[Tensor], damping: Damping) -> list[Tensor]:
    """Return (M + λI)⁻¹ times a block (..., n, m) for each factor. The factor None stands for I, undamped.

    All low-rank factors are solved together, and so are all other factors of one form.
    """

    def solve_kind(members: list[tuple[Factor, LowRank | None, Tensor, Tensor]]) -> Sequence[Tensor]:
        if members[0][1] is None:
            problems = [(factor.state, block, shift) for factor, _, block, shift in members]
            return members[0][0].form.damped_solve_of_each(problems)
        of_kind, operands, right, shifts = (list(part) for part in zip(*members, strict=True))
        return grouped.damped_solve(operands, right, shifts, tail=[factor.form.tail for factor in of_kind])

    given = [factor for factor in factors if factor is not None]
    operands = [factor.operand() for factor in given]
    right = [block for factor, block in zip(factors, blocks, strict=True) if factor is not None]
    problems = list(zip(given, operands, right, dampings_of_each(given, damping), strict=True))
    solved = iter(map_by_kind(problems, lambda one: one[0].form if one[1] is None else None, solve_kind))
    return [block if factor is None else next(solved) for factor, block in zip(factors, blocks, strict=True)]
