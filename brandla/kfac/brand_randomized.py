"""B-R-KFAC: Brand updates between randomized decompositions of the dense factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from brandla import _check
from brandla.brand import eigh_update
from brandla.kfac.brand import substitute_for_brand
from brandla.kfac.randomized import Randomized
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
class BrandRandomized(Strategy):
    """B-R-KFAC: fresh at every update, and rid of truncation error every ``overwrite_every`` steps. O(n²) memory.

    References
    ----------
    C. O. Puiu, "Brand New K-FACs", arXiv 2210.08494, the variant with overwriting.
    """

    rank: int
    overwrite_every: int = 50
    oversample: int = 10
    power_iterations: int = 3

    def __post_init__(self) -> None:
        check_strategy(self)
        check_period(self, "overwrite_every")
        _check.count("BrandRandomized", "oversample", self.oversample, 0)
        _check.count("BrandRandomized", "power_iterations", self.power_iterations, 0)

    def start(self, n: int, dtype: torch.dtype, device: torch.device) -> State:
        """Begin with a zero matrix and nothing known of it."""
        state: State = {"dense": torch.zeros(n, n, dtype=dtype, device=device)}
        store(state, LowRankEigh.zeros(n, self.rank, dtype=dtype, device=device))
        return state

    def absorb(self, state: State, columns: Tensor, average: Average) -> None:
        """Add the columns to the dense average and update the decomposition."""
        decay, weight = average
        gram_ema_(tensor(state, "dense"), columns, decay, weight)
        store(state, eigh_update(eigh_of(state), columns, decay=decay, weight=weight))

    def refresh(self, state: State, step: int, seed: int) -> None:
        """Overwrite the decomposition when it is due."""
        if due(state, step, self.overwrite_every):
            randomized = Randomized(self.rank, oversample=self.oversample, power_iterations=self.power_iterations)
            store(state, randomized.decompose(tensor(state, "dense"), seed))

    def lowrank(self, state: State) -> LowRankEigh:
        """``rank`` eigenpairs."""
        return eigh_of(state)

    def error_bound(self, state: State) -> Tensor:
        """Distance from the dense average as it is now."""
        return distance(state)

    def substitute(self, n: int, k: int) -> tuple[Strategy, str] | None:
        """Give way where r + k columns span the whole space."""
        return substitute_for_brand(self, n, self.rank, k)
