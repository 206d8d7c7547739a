"""B-KFAC: factors kept as low-rank eigendecompositions by Brand's update, with no dense matrix anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from brandla import _check, grouped
from brandla.kfac.adaptive import ErrorBound
from brandla.kfac.exact import Exact
from brandla.kfac.factor import (
    Absorption,
    FactorStrategy,
    State,
    check_factor_strategy,
    check_rank,
    due,
    first_rank,
    fitting,
    normalised,
    rank_at,
    store,
    stored,
    stored_normalised,
    tensor,
)
from brandla.kfac.randomized import Randomized
from brandla.kfac.schedule import Schedule
from brandla.kfac.strategy import Damping
from brandla.lowrank import LowRankEigh, LowRankSym, Tracked
from brandla.rank import Rank
from brandla_kernels import signs


def update_eigh(absorptions: Sequence[Absorption], rank: int | Rank) -> None:
    """Take columns into the decompositions of the states by Brand's update."""
    columns, options = columns_and_options(absorptions, [rank] * len(absorptions))
    updated = grouped.eigh_update([stored(state) for state, *_ in absorptions], columns, **options)
    for (state, *_), eigh in zip(absorptions, updated, strict=True):
        store(state, eigh)


def sketched(absorptions: Sequence[Absorption], width: int, step: int) -> list[Absorption]:
    """Bring batches of more columns down to ``width``: A Ω / √width with the same random signs for all of a size."""
    drawn: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def narrow(absorption: Absorption) -> Absorption:
        columns = absorption.columns
        k = columns.shape[-1]
        if k <= width:
            return absorption
        key = k, columns.dtype, columns.device
        if key not in drawn:
            seed = torch.full((), step, dtype=torch.int64, device=columns.device)
            drawn[key] = signs(seed, k, width, dtype=columns.dtype) / math.sqrt(width)
        return absorption._replace(columns=columns @ drawn[key])

    return [narrow(absorption) for absorption in absorptions]


def columns_and_options(
    absorptions: Sequence[Absorption], ranks: Sequence[int | Rank]
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the columns, and decay, weight and rank as the grouped updates take them."""
    columns = [absorption.columns for absorption in absorptions]
    options = {
        "decay": [absorption.average.decay for absorption in absorptions],
        "weight": [absorption.average.weight for absorption in absorptions],
        "rank": [
            fitting(rank, _basis(absorption.state), absorption.columns)
            for rank, absorption in zip(ranks, absorptions, strict=True)
        ],
    }
    return columns, options


@dataclass(frozen=True)
class Brand(FactorStrategy):
    """B-KFAC: U and d (or S) only. O(n r) memory, and time linear in n at every update.

    Parameters
    ----------
    rank
        r: a number, a function of the step that returns one, a `brandla.Rank` rule (also as a function's value), or
        `ErrorBound`, a rank that follows the error bound.
    update
        ``"exact"``, or ``"subspace"``: the update with no eigendecomposition and no host sync.
    sketch
        Columns that a batch of more, A, is first brought down to: A Ω for random signs Ω, with A Aᵀ as its expectation.
        The average over batches smooths what the signs add, and ``error_bound`` is that of the average of what was
        taken in. None takes every batch as it is.

    References
    ----------
    C. O. Puiu, "Brand New K-FACs: speeding up K-FAC with online decomposition updates", arXiv 2210.08494.
    """

    unread: ClassVar[tuple[str, ...]] = ("error_bound",)

    rank: Schedule[int | Rank] | ErrorBound
    update: Literal["exact", "subspace"] = "exact"
    sketch: int | None = None

    def __post_init__(self) -> None:
        check_factor_strategy(self)
        if self.sketch is not None:
            _check.count("Brand", "sketch", self.sketch, 1)
        if not isinstance(self.rank, ErrorBound):
            check_rank(self, self.rank)
        if self.update not in ("exact", "subspace"):
            _check.fail_value("Brand", f"update must be 'exact' or 'subspace'; got {self.update!r}")

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Begin with nothing known."""
        state: State = {"error_bound": torch.zeros(groups, dtype=dtype, device=device)}
        rank = self._first_rank
        if isinstance(self.rank, ErrorBound):
            state["rank"] = rank
        if self.update == "exact":
            store(state, LowRankEigh.zeros(n, rank, batch_shape=groups, dtype=dtype, device=device))
        else:
            zeros = LowRankSym.zeros(n, rank, batch_shape=groups, dtype=dtype, device=device)
            state["core"], state["basis"] = zeros
        return state

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Update the decompositions with the columns."""
        if self.sketch is not None:
            absorptions = sketched(absorptions, self.sketch, step)
        ranks = [self._rank(absorption.state, step) for absorption in absorptions]
        columns, options = columns_and_options(absorptions, ranks)
        bounds = [tensor(state, "error_bound") for state, *_ in absorptions]
        if self.update == "exact":
            tracked = [Tracked(stored(state), bound) for (state, *_), bound in zip(absorptions, bounds, strict=True)]
            for (state, *_), (eigh, bound) in zip(
                absorptions, grouped.eigh_update(tracked, columns, **options), strict=True
            ):
                store(state, eigh)
                state["error_bound"] = bound
            return
        syms = [Tracked(_sym(state), bound) for (state, *_), bound in zip(absorptions, bounds, strict=True)]
        for (state, *_), ((core, basis), bound) in zip(
            absorptions, grouped.subspace_update(syms, columns, **options), strict=True
        ):
            state.update(core=core, basis=basis, error_bound=bound)

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        """Read the error bound when it is due, where the rank follows it."""
        if isinstance(self.rank, ErrorBound) and due(state, step, self.rank.every):
            largest = self.largest(state)
            # A factor that is still zero has no error.
            errors = torch.where(largest > 0, self.error_bound(state) / largest, 0)
            error = errors.amax().item()
            state["rank"] = self.rank.next(cast(int, state["rank"]), error)

    def lowrank(self, state: State) -> LowRankEigh | LowRankSym:
        """``rank`` eigenpairs, or a basis of ``rank`` columns with its core."""
        if self.update == "exact":
            return stored_normalised(state)
        core, basis = _sym(state)
        return LowRankSym(normalised(state, core), basis)

    def error_bound(self, state: State) -> Tensor:
        """Return the running bound that travels with the factor."""
        return normalised(state, tensor(state, "error_bound"))

    def substitute(self, n: int, k: int) -> tuple[FactorStrategy, str] | None:
        """Give way where r + k columns span the whole space, so that a low-rank update saves nothing."""
        return substitute_for_brand(self, n, self._first_rank, k if self.sketch is None else min(k, self.sketch))

    @property
    def _first_rank(self) -> int:
        return self.rank.least if isinstance(self.rank, ErrorBound) else first_rank(self.rank)

    def _rank(self, state: State, step: int) -> int | Rank:
        return cast(int, state["rank"]) if isinstance(self.rank, ErrorBound) else rank_at(self.rank, step)


def _basis(state: State) -> Tensor:
    return tensor(state, "basis" if "basis" in state else "eigenvectors")


def _sym(state: State) -> LowRankSym:
    return LowRankSym(tensor(state, "core"), tensor(state, "basis"))


def substitute_for_brand(strategy: FactorStrategy, n: int, rank: int, k: int) -> tuple[FactorStrategy, str] | None:
    """Return what stands in for a Brand strategy: Exact at every step for a small order, else Randomized."""
    if rank + k < n:
        return None
    reason = f"rank {rank} + {k} columns a batch >= n = {n}"
    if n <= 2 * rank:
        return Exact(inverse_every=1, tail=strategy.tail), reason
    return Randomized(rank, tail=strategy.tail), reason
