"""A factor that is diagonal by itself: that of one-hot inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brandla.kfac.factor import (
    Absorption,
    FactorStrategy,
    State,
    check_factor_strategy,
    normalised,
    tensor,
)


@dataclass(frozen=True, kw_only=True)
class Diagonal(FactorStrategy):
    """The factor of an embedding's one-hot inputs: M = diag(frequencies), exact in n numbers.

    Its columns are given as indices (k,), −1 for a column of zeros. ``tail`` has no part in it: nothing is unseen.
    """

    def __post_init__(self) -> None:
        check_factor_strategy(self)

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Begin with zeros."""
        return {"diagonal": torch.zeros(*groups, n, dtype=dtype, device=device)}

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Count the indices."""
        for state, indices, (decay, weight), finite in absorptions:
            diagonal = tensor(state, "diagonal")
            weights = ((indices >= 0) & finite).to(diagonal.dtype) * weight
            diagonal.mul_(decay).index_add_(0, indices.clamp(min=0), weights)

    def lowrank(self, state: State) -> None:
        """None: its solve is a division."""

    def largest(self, state: State) -> Tensor:
        """Return the largest frequency."""
        return normalised(state, tensor(state, "diagonal")).amax(-1)

    def damped_solve(self, state: State, block: Tensor, shift: Tensor) -> Tensor:
        """Divide the rows of the block by the frequencies and λ."""
        return block / (normalised(state, tensor(state, "diagonal")) + shift[..., None])[..., None]

    def error_bound(self, state: State) -> Tensor:
        """0: nothing is left out."""
        return tensor(state, "diagonal").new_zeros(())
