"""Factors that are small by themselves: the diagonal one of one-hot inputs, and the blocks of scales and shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from brandla.kfac.systems.form import Absorption, DenseForm, FactorForm, State
from brandla.kfac.values import alike, layout
from brandla.lowrank import stack_numbers, stacked


@dataclass(frozen=True, kw_only=True)
class Diagonal(FactorForm):
    """The factor of an embedding's one-hot inputs: M = diag(frequencies), exact in n numbers, so with no tail.

    Its columns are given as indices (k,), −1 for a column of zeros.
    """

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        return {"diagonal": torch.zeros(*groups, n, dtype=dtype, device=device)}

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        for state, indices, decay, weight, finite, _ in absorptions:
            diagonal = state["diagonal"]
            weights = ((indices >= 0) & finite).to(diagonal.dtype) * weight
            diagonal.mul_(decay).index_add_(0, indices.clamp(min=0), weights)

    def largest(self, state: State) -> Tensor:
        return cast(Tensor, state["diagonal"].amax(-1) / state["total"])

    def damped_solve(self, state: State, block: Tensor, shift: Tensor) -> Tensor:
        return block / (state["diagonal"] / state["total"] + shift[..., None])[..., None]

    def error_bound(self, state: State) -> Tensor:
        return torch.zeros_like(state["total"])


@dataclass(frozen=True, kw_only=True)
class Blocks(DenseForm):
    """Factors of order 1 and 2, many at once, solved with directly at every step, so with no tail."""

    unread: ClassVar[tuple[str, ...]] = ()

    def largest(self, state: State) -> Tensor:
        return self.largest_of_each([state])[0]

    def largest_of_each(self, states: Sequence[State]) -> list[Tensor]:
        """Return the largest eigenvalues, in closed form: ½ (a + c) + √(¼ (a − c)² + b²)."""

        def of(members: list[State]) -> Sequence[Tensor]:
            blocks = _averages(members)
            diagonal = blocks.diagonal(dim1=-2, dim2=-1)
            if diagonal.shape[-1] == 1:
                return diagonal[..., 0].unbind()
            first, last = diagonal.unbind(-1)
            return ((first + last) / 2 + torch.hypot((first - last) / 2, blocks[..., 0, 1])).unbind()

        return alike(states, lambda state: layout(state["dense"]), of)

    def damped_solve_of_each(
        self, states: Sequence[State], blocks: Sequence[Tensor], shifts: Sequence[Tensor]
    ) -> list[Tensor]:
        """Solve densely; regular, since λ > 0."""

        def of(members: list[tuple[State, Tensor, Tensor]]) -> Sequence[Tensor]:
            own, right, added = zip(*members, strict=True)
            averages = _averages(own)
            averages.diagonal(dim1=-2, dim2=-1).add_(stacked(added)[..., None])
            return torch.linalg.solve_ex(averages, stacked(right)).result.unbind()

        problems = list(zip(states, blocks, shifts, strict=True))
        return alike(problems, lambda own: (layout(own[0]["dense"]), layout(own[1])), of)

    def error_bound(self, state: State) -> Tensor:
        return torch.zeros_like(state["total"])


def _averages(states: Sequence[State]) -> Tensor:
    """Return M = S / total of each state, in one tensor."""
    sums = stacked([state["dense"] for state in states])
    totals = stack_numbers([state["total"] for state in states], sums)
    assert isinstance(totals, Tensor)
    return sums / totals.view(-1, *[1] * (sums.ndim - 1))
