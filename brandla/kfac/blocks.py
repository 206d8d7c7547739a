"""Factors of order 1 and 2, many at once: those of scales and shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brandla.kfac.exact import add_to_dense
from brandla.kfac.factor import Absorption, FactorStrategy, State, check_factor_strategy, normalised, tensor


@dataclass(frozen=True, kw_only=True)
class Blocks(FactorStrategy):
    """Small dense factors, solved with directly at every step. ``tail`` has no part in it: nothing is unseen."""

    def __post_init__(self) -> None:
        check_factor_strategy(self)

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Begin with zero matrices."""
        return {"dense": torch.zeros(*groups, n, n, dtype=dtype, device=device)}

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Add the columns to the dense sums."""
        add_to_dense(absorptions)

    def lowrank(self, state: State) -> None:
        """None: its solve is a dense one."""

    def largest(self, state: State) -> Tensor:
        """Return the largest eigenvalues, in closed form: ½ (a + c) + √(¼ (a − c)² + b²)."""
        diagonal = _blocks(state).diagonal(dim1=-2, dim2=-1)
        if diagonal.shape[-1] == 1:
            return diagonal[..., 0]
        first, last = diagonal.unbind(-1)
        return (first + last) / 2 + torch.hypot((first - last) / 2, _blocks(state)[..., 0, 1])

    def damped_solve(self, state: State, block: Tensor, shift: Tensor) -> Tensor:
        """Solve densely; regular, since λ > 0."""
        blocks = _blocks(state)
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        solution: Tensor = torch.linalg.solve_ex(blocks + shift[..., None, None] * eye, block).result
        return solution

    def error_bound(self, state: State) -> Tensor:
        """0: nothing is left out."""
        return tensor(state, "dense").new_zeros(())


def _blocks(state: State) -> Tensor:
    return normalised(state, tensor(state, "dense"))
