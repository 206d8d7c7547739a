"""B-R-KFAC: Brand updates between randomized decompositions of the dense factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.schedule import Schedule
from brandla.kfac.systems.brand import LowRank, kept, sketched, substitute_for_brand, update
from brandla.kfac.systems.factor import (
    Absorption,
    State,
    add_to_dense,
    check_factor_form,
    check_period,
    distance,
    due,
    keep_trace,
    normalised,
    store,
    tensor,
)
from brandla.kfac.systems.kronecker import FactorStrategy
from brandla.kfac.systems.randomized import Randomized
from brandla.kfac.systems.rank import check_rank, first_rank, rank_at
from brandla.kfac.values import Damping
from brandla.lowrank import LowRankEigh, LowRankRoot, Rank


@dataclass(frozen=True)
class BrandRandomized(FactorStrategy):
    """B-R-KFAC: fresh at every update, and rid of truncation error every ``overwrite_every`` steps. O(n²) memory.

    Parameters
    ----------
    rank
        r: a number, a `brandla.Rank` rule, or a function of the step that returns one of them.
    overwrite_every
        Steps between the decompositions that overwrite: a number, or a function of the step.
    oversample, power_iterations
        Of these decompositions, as `brandla.randomized_eigh` takes them.

    References
    ----------
    C. O. Puiu, "Brand New K-FACs", arXiv 2210.08494, the variant with overwriting.
    """

    unread: ClassVar[tuple[str, ...]] = ("dense",)

    rank: Schedule[int | Rank]
    overwrite_every: Schedule[int] = 50
    oversample: int = 10
    power_iterations: int = 3

    def __post_init__(self) -> None:
        check_factor_form(self)
        check_rank(self, self.rank)
        check_period(self, "overwrite_every")
        _check.count("BrandRandomized", "oversample", self.oversample, 0)
        _check.count("BrandRandomized", "power_iterations", self.power_iterations, 0)

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Begin with a zero matrix and nothing known of it."""
        state: State = {"dense": torch.zeros(*groups, n, n, dtype=dtype, device=device)}
        store(state, LowRankRoot.zeros(n, first_rank(self.rank), batch_shape=groups, dtype=dtype, device=device))
        return state

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Add the columns to the dense sum, and take them, sketched where they are many, into the low-rank form."""
        add_to_dense(absorptions)
        update(sketched(absorptions, "auto", step), [rank_at(self.rank, step)] * len(absorptions))

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        """Overwrite the decomposition when it is due."""
        if due(state, step, self.overwrite_every):
            rank = kept(state).rank
            randomized = Randomized(rank, oversample=self.oversample, power_iterations=self.power_iterations)
            values, vectors = randomized.decompose(tensor(state, "dense"), rank, seed)
            store(state, LowRankRoot.from_eigh(LowRankEigh(normalised(state, values), vectors)))
        keep_trace(self, state)

    def lowrank(self, state: State) -> LowRank:
        """``rank`` columns."""
        return kept(state)

    def largest(self, state: State) -> Tensor:
        """Return d₁, which an update and an overwriting both leave first on the diagonal of S."""
        return tensor(state, "gram")[..., 0, 0]

    def error_bound(self, state: State) -> Tensor:
        """Distance from the dense average as it is now."""
        return distance(state, kept(state).dense())

    def substitute(self, n: int) -> tuple[FactorStrategy, str] | None:
        """Give way where the low-rank form is no smaller than the matrix."""
        return substitute_for_brand(self, n, first_rank(self.rank))
