"""B-KFAC-C: Brand updates, corrected now and then against the dense factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from brandla import _check
from brandla.correction import ritz_correct
from brandla.kfac.schedule import Schedule
from brandla.kfac.systems.brand import sketched, substitute_for_brand, update
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
    stored,
    tensor,
)
from brandla.kfac.systems.kronecker import FactorStrategy
from brandla.kfac.systems.rank import check_rank, first_rank, rank_at
from brandla.kfac.values import Damping
from brandla.lowrank import LowRankEigh, Rank


@dataclass(frozen=True)
class BrandCorrected(FactorStrategy):
    """B-KFAC-C: every ``correct_every`` steps, Rayleigh–Ritz on a random ``fraction`` of the columns. O(n²) memory.

    Parameters
    ----------
    rank
        r: a number, a `brandla.Rank` rule, or a function of the step that returns one of them.
    correct_every
        Steps between corrections: a number, or a function of the step.
    fraction
        Part of the columns of U that a correction takes, in (0, 1].

    References
    ----------
    C. O. Puiu, "Brand New K-FACs", arXiv 2210.08494, the corrected variant.
    """

    unread: ClassVar[tuple[str, ...]] = ("dense",)

    rank: Schedule[int | Rank]
    correct_every: Schedule[int] = 10
    fraction: float = 0.5

    def __post_init__(self) -> None:
        check_factor_form(self)
        check_rank(self, self.rank)
        check_period(self, "correct_every")
        if not 0 < self.fraction <= 1:
            _check.fail_value("BrandCorrected", f"fraction must be in (0, 1]; got {self.fraction}")

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Begin with a zero matrix and nothing known of it."""
        state: State = {"dense": torch.zeros(*groups, n, n, dtype=dtype, device=device)}
        store(state, LowRankEigh.zeros(n, first_rank(self.rank), batch_shape=groups, dtype=dtype, device=device))
        return state

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Add the columns to the dense sum, and take them, sketched where they are many, into the low-rank form."""
        add_to_dense(absorptions)
        update(sketched(absorptions, "auto", step), [rank_at(self.rank, step)] * len(absorptions))

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        """Correct a random part of the columns when it is due."""
        if due(state, step, self.correct_every):
            dense = tensor(state, "dense")
            generator = torch.Generator(dense.device)
            generator.manual_seed(seed)
            eigh = stored(state)
            shuffled = torch.randperm(eigh.rank, generator=generator, device=dense.device)
            subset = shuffled[: math.ceil(self.fraction * eigh.rank)]
            store(state, ritz_correct(eigh, normalised(state, dense), subset))
        keep_trace(self, state)

    def lowrank(self, state: State) -> LowRankEigh:
        """``rank`` eigenpairs."""
        return stored(state)

    def error_bound(self, state: State) -> Tensor:
        """Distance from the dense average as it is now."""
        return distance(state, stored(state).dense())

    def substitute(self, n: int) -> tuple[FactorStrategy, str] | None:
        """Give way where the low-rank form is no smaller than the matrix."""
        return substitute_for_brand(self, n, first_rank(self.rank))
