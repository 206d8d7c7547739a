"""K-FAC as it was first described: a dense running factor and its full eigendecomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brandla._core import safe_eigh
from brandla.kfac.factor import (
    Absorption,
    FactorStrategy,
    State,
    check_factor_strategy,
    check_period,
    distance,
    due,
    normalised,
    store,
    stored,
    tensor,
)
from brandla.kfac.strategy import Damping
from brandla.lowrank import LowRankEigh
from brandla_kernels import gram_ema_


def add_to_dense(absorptions: Sequence[Absorption]) -> None:
    """Take columns into the dense sums of the states."""
    for state, columns, (decay, weight), _ in absorptions:
        gram_ema_(tensor(state, "dense"), columns, decay, weight)


@dataclass(frozen=True)
class Exact(FactorStrategy):
    """K-FAC: dense average, full ``eigh`` every ``inverse_every`` steps. O(n²) memory, O(n³) at a renewal.

    References
    ----------
    J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.
    """

    inverse_every: int = 10

    def __post_init__(self) -> None:
        check_factor_strategy(self)
        check_period(self, "inverse_every")

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Begin with a zero matrix."""
        state: State = {"dense": torch.zeros(*groups, n, n, dtype=dtype, device=device)}
        store(state, LowRankEigh.zeros(n, n, batch_shape=groups, dtype=dtype, device=device))
        return state

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Add the columns to the dense sum."""
        add_to_dense(absorptions)

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        """Decompose the dense average when it is due."""
        if due(state, step, self.inverse_every):
            store(state, LowRankEigh(*safe_eigh(normalised(state, tensor(state, "dense")))))

    def lowrank(self, state: State) -> LowRankEigh:
        """All n eigenpairs."""
        return stored(state)

    def error_bound(self, state: State) -> Tensor:
        """Distance from the dense average as it is now: rounding at a renewal, staleness after it."""
        return distance(state, stored(state))
