"""B-KFAC: factors kept as low-rank eigendecompositions by Brand's update, with no dense matrix anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from brandla import _check
from brandla.brand import eigh_update
from brandla.kfac.exact import Exact
from brandla.kfac.randomized import Randomized
from brandla.kfac.strategy import (
    Average,
    State,
    Strategy,
    check_strategy,
    eigh_of,
    store,
    tensor,
)
from brandla.lowrank import LowRankEigh, LowRankSym, Tracked
from brandla.subspace import subspace_update


@dataclass(frozen=True)
class Brand(Strategy):
    """B-KFAC: U and d (or S) only. O(n r) memory, and time linear in n at every update.

    ``update="subspace"`` uses the update with no eigendecomposition: no host sync.

    References
    ----------
    C. O. Puiu, "Brand New K-FACs: speeding up K-FAC with online decomposition updates", arXiv 2210.08494.
    """

    rank: int
    update: Literal["exact", "subspace"] = "exact"

    def __post_init__(self) -> None:
        check_strategy(self)
        if self.update not in ("exact", "subspace"):
            _check.fail_value("Brand", f"update must be 'exact' or 'subspace'; got {self.update!r}")

    def start(self, n: int, dtype: torch.dtype, device: torch.device) -> State:
        """Begin with nothing known."""
        state: State = {"error_bound": torch.zeros((), dtype=dtype, device=device)}
        if self.update == "exact":
            store(state, LowRankEigh.zeros(n, self.rank, dtype=dtype, device=device))
        else:
            state["core"], state["basis"] = LowRankSym.zeros(n, self.rank, dtype=dtype, device=device)
        return state

    def absorb(self, state: State, columns: Tensor, average: Average) -> None:
        """Update the decomposition with the columns."""
        bound = tensor(state, "error_bound")
        decay, weight = average
        if self.update == "exact":
            eigh, state["error_bound"] = eigh_update(
                Tracked(eigh_of(state), bound), columns, decay=decay, weight=weight
            )
            store(state, eigh)
        else:
            sym, state["error_bound"] = subspace_update(
                Tracked(self._sym(state), bound), columns, decay=decay, weight=weight
            )
            state["core"], state["basis"] = sym

    def lowrank(self, state: State) -> LowRankEigh | LowRankSym:
        """``rank`` eigenpairs, or a basis of ``rank`` columns with its core."""
        return eigh_of(state) if self.update == "exact" else self._sym(state)

    def error_bound(self, state: State) -> Tensor:
        """Return the running bound that travels with the factor."""
        return tensor(state, "error_bound")

    def substitute(self, n: int, k: int) -> tuple[Strategy, str] | None:
        """Give way where r + k columns span the whole space, so that a low-rank update saves nothing."""
        return substitute_for_brand(self, n, self.rank, k)

    @staticmethod
    def _sym(state: State) -> LowRankSym:
        return LowRankSym(tensor(state, "core"), tensor(state, "basis"))


def substitute_for_brand(strategy: Strategy, n: int, rank: int, k: int) -> tuple[Strategy, str] | None:
    """Return what stands in for a Brand strategy: Exact at every step for a small order, else Randomized."""
    if rank + k < n:
        return None
    reason = f"rank {rank} + {k} columns a batch >= n = {n}"
    if n <= 2 * rank:
        return Exact(inverse_every=1, tail=strategy.tail), reason
    return Randomized(rank, tail=strategy.tail), reason
