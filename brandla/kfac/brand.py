"""B-KFAC: factors kept as low-rank eigendecompositions by Brand's update, with no dense matrix anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from brandla import _check, grouped
from brandla.kfac.exact import Exact
from brandla.kfac.factor import (
    Absorption,
    FactorStrategy,
    State,
    check_factor_strategy,
    normalised,
    store,
    stored,
    stored_normalised,
    tensor,
)
from brandla.kfac.randomized import Randomized
from brandla.lowrank import LowRankEigh, LowRankSym, Tracked


def update_eigh(absorptions: Sequence[Absorption]) -> None:
    """Take columns into the decompositions of the states by Brand's update."""
    columns, averages = columns_and_averages(absorptions)
    updated = grouped.eigh_update([stored(state) for state, *_ in absorptions], columns, **averages)
    for (state, *_), eigh in zip(absorptions, updated, strict=True):
        store(state, eigh)


def columns_and_averages(absorptions: Sequence[Absorption]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the columns, and decay and weight as the grouped updates take them."""
    decays = [absorption.average.decay for absorption in absorptions]
    weights = [absorption.average.weight for absorption in absorptions]
    return [absorption.columns for absorption in absorptions], {"decay": decays, "weight": weights}


@dataclass(frozen=True)
class Brand(FactorStrategy):
    """B-KFAC: U and d (or S) only. O(n r) memory, and time linear in n at every update.

    ``update="subspace"`` uses the update with no eigendecomposition: no host sync.

    References
    ----------
    C. O. Puiu, "Brand New K-FACs: speeding up K-FAC with online decomposition updates", arXiv 2210.08494.
    """

    rank: int
    update: Literal["exact", "subspace"] = "exact"

    def __post_init__(self) -> None:
        check_factor_strategy(self)
        if self.update not in ("exact", "subspace"):
            _check.fail_value("Brand", f"update must be 'exact' or 'subspace'; got {self.update!r}")

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Begin with nothing known."""
        state: State = {"error_bound": torch.zeros(groups, dtype=dtype, device=device)}
        if self.update == "exact":
            store(state, LowRankEigh.zeros(n, self.rank, batch_shape=groups, dtype=dtype, device=device))
        else:
            zeros = LowRankSym.zeros(n, self.rank, batch_shape=groups, dtype=dtype, device=device)
            state["core"], state["basis"] = zeros
        return state

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Update the decompositions with the columns."""
        columns, averages = columns_and_averages(absorptions)
        bounds = [tensor(state, "error_bound") for state, *_ in absorptions]
        if self.update == "exact":
            tracked = [Tracked(stored(state), bound) for (state, *_), bound in zip(absorptions, bounds, strict=True)]
            for (state, *_), (eigh, bound) in zip(
                absorptions, grouped.eigh_update(tracked, columns, **averages), strict=True
            ):
                store(state, eigh)
                state["error_bound"] = bound
            return
        syms = [Tracked(_sym(state), bound) for (state, *_), bound in zip(absorptions, bounds, strict=True)]
        for (state, *_), ((core, basis), bound) in zip(
            absorptions, grouped.subspace_update(syms, columns, **averages), strict=True
        ):
            state.update(core=core, basis=basis, error_bound=bound)

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
        return substitute_for_brand(self, n, self.rank, k)


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
