"""RS-KFAC and SRE-KFAC: a dense running factor and its randomized decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.schedule import Schedule, at
from brandla.kfac.systems.exact import Exact
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
from brandla.kfac.values import Damping
from brandla.lowrank import LowRankEigh
from brandla.randomized import randomized_eigh, randomized_svd


@dataclass(frozen=True)
class Randomized(FactorStrategy):
    """RS-KFAC (``method="svd"``) and SRE-KFAC (``method="eigh"``): O(n²) memory, O(n² r) at a renewal.

    Parameters
    ----------
    rank
        r: a number, or a function of the step.
    method
        ``"eigh"``: `brandla.randomized_eigh` of the dense average; ``"svd"``: `brandla.randomized_svd`.
    oversample, power_iterations
        As those functions take them.
    inverse_every
        Steps between renewals: a number, or a function of the step.

    References
    ----------
    C. O. Puiu, "Randomized K-FACs: speeding up K-FAC with randomized numerical linear algebra", arXiv 2206.15397.
    """

    unread: ClassVar[tuple[str, ...]] = ("dense",)

    rank: Schedule[int]
    method: Literal["svd", "eigh"] = "eigh"
    oversample: int = 10
    power_iterations: int = 3
    inverse_every: Schedule[int] = 10

    def __post_init__(self) -> None:
        check_factor_form(self)
        _check.count("Randomized", "rank", at(self.rank, 0), 1)
        check_period(self, "inverse_every")
        _check.count("Randomized", "oversample", self.oversample, 0)
        _check.count("Randomized", "power_iterations", self.power_iterations, 0)
        if self.method not in ("svd", "eigh"):
            _check.fail_value("Randomized", f"method must be 'svd' or 'eigh'; got {self.method!r}")

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Begin with a zero matrix."""
        state: State = {"dense": torch.zeros(*groups, n, n, dtype=dtype, device=device)}
        store(state, LowRankEigh.zeros(n, at(self.rank, 0), batch_shape=groups, dtype=dtype, device=device))
        return state

    def take(self, absorptions: Sequence[Absorption], step: int) -> None:
        """Add the columns to the dense sum."""
        add_to_dense(absorptions)

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        """Decompose the dense average when it is due."""
        if due(state, step, self.inverse_every):
            average = normalised(state, tensor(state, "dense"))
            rank = min(at(self.rank, step), average.shape[-1])
            store(state, self.decompose(average, rank, seed))
            keep_trace(self, state)

    def decompose(self, matrix: Tensor, rank: int, seed: int) -> LowRankEigh:
        """Return the ``rank`` leading eigenpairs of ``matrix`` from a random start that ``seed`` fixes."""
        generator = torch.Generator(matrix.device)
        generator.manual_seed(seed)
        if self.method == "eigh":
            return randomized_eigh(
                matrix,
                rank,
                oversample=self.oversample,
                power_iterations=self.power_iterations,
                generator=generator,
            )
        svd = randomized_svd(
            matrix,
            rank,
            oversample=self.oversample,
            power_iterations=self.power_iterations,
            generator=generator,
        )
        return LowRankEigh(svd.S, svd.U)

    def lowrank(self, state: State) -> LowRankEigh:
        """``rank`` eigenpairs."""
        return stored(state)

    def error_bound(self, state: State) -> Tensor:
        """Distance from the dense average as it is now."""
        return distance(state, stored(state).dense())

    def substitute(self, n: int) -> tuple[FactorStrategy, str] | None:
        """Give small factors to Exact: a sketch as wide as the matrix saves nothing."""
        rank = at(self.rank, 0)
        if rank + self.oversample < n:
            return None
        reason = f"rank {rank} + oversample {self.oversample} >= n = {n}"
        return Exact(inverse_every=self.inverse_every, tail=self.tail), reason
