"""K-FAC as it was first described: a dense running factor and its full eigendecomposition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brandla._core import safe_eigh
from brandla.kfac.strategy import (
    Average,
    State,
    Strategy,
    check_period,
    check_strategy,
    distance,
    due,
    eigh_of,
    store,
    tensor,
)
from brandla.lowrank import LowRankEigh
from brandla_kernels import gram_ema_


@dataclass(frozen=True)
class Exact(Strategy):
    """K-FAC: dense average, full ``eigh`` every ``inverse_every`` steps. O(n²) memory, O(n³) at a renewal.

    References
    ----------
    J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.
    """

    inverse_every: int = 10

    def __post_init__(self) -> None:
        check_strategy(self)
        check_period(self, "inverse_every")

    def start(self, n: int, dtype: torch.dtype, device: torch.device) -> State:
        """Begin with a zero matrix."""
        state: State = {"dense": torch.zeros(n, n, dtype=dtype, device=device)}
        store(state, LowRankEigh.zeros(n, n, dtype=dtype, device=device))
        return state

    def absorb(self, state: State, columns: Tensor, average: Average) -> None:
        """Add the columns to the dense average."""
        gram_ema_(tensor(state, "dense"), columns, average.decay, average.weight)

    def refresh(self, state: State, step: int, seed: int) -> None:
        """Decompose the dense average when it is due."""
        if due(state, step, self.inverse_every):
            store(state, LowRankEigh(*safe_eigh(tensor(state, "dense"))))

    def lowrank(self, state: State) -> LowRankEigh:
        """All n eigenpairs."""
        return eigh_of(state)

    def error_bound(self, state: State) -> Tensor:
        """Distance from the dense average as it is now: rounding at a renewal, staleness after it."""
        return distance(state)
