"""The trackers: what each keeps of a factor, and what a step of it costs.

A factor is M ← ρM + wAAᵀ. The dense average, which all but B keep, is the same for all and kept once.

| tracker | step | now and then |
|---|---|---|
| B | `eigh_update` | |
| B, root | `root_update` | |
| B, no eigh | `root_update`, ``compress="cholesky"`` | |
| B-R | `eigh_update` | overwritten by `randomized_svd` of the average |
| B-C | `eigh_update` | `ritz_correct` of a random part of its columns |
| RS | | `randomized_svd` of the average |
| SRE | | `randomized_eigh` of the average |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import brandla
from bench.accuracy.settings import Settings
from bench.benches import timing
from brandla.correction import ritz_correct
from brandla.root import Compress
from brandla_kernels import gram_ema_

Factor = brandla.LowRankEigh | brandla.LowRankRoot
ROOTS = ("root", "cholesky")
BEST = "best rank r"


class Costs(NamedTuple):
    """Milliseconds of each piece, for one factor."""

    average: float
    brand: float
    root: float
    cholesky: float
    svd: float
    eigh: float
    correction: float


@dataclass(frozen=True)
class Tracker:
    """A way of keeping a factor: an update at every step or none, and a renewal every ``period`` steps or none."""

    name: str
    update: str | None
    renewal: str | None
    period: int

    def cost(self, costs: Costs) -> float:
        """Milliseconds of a step, the dense average included where it is needed."""
        renewed = (costs.average + getattr(costs, self.renewal) / self.period) if self.renewal else 0.0
        return renewed + (getattr(costs, self.update) if self.update else 0.0)

    def due(self, step: int) -> bool:
        """Say whether this step, of those counted from 1, ends with a renewal."""
        return self.renewal is not None and (step - 1) % self.period == 0


def trackers(settings: Settings, costs: Costs) -> list[Tracker]:
    """Return all trackers: B-R as it is set, and B-C, RS and SRE renewed as often as its cost pays for.

    RS and SRE come once more with the period of B-R.
    """
    every = settings.overwrite_every
    b_r = Tracker("B-R", "brand", "svd", every)
    to_spend = b_r.cost(costs) - costs.average
    beside_brand = to_spend - costs.brand
    return [
        Tracker("B", "brand", None, 0),
        Tracker("B, root", "root", None, 0),
        Tracker("B, no eigh", "cholesky", None, 0),
        b_r,
        Tracker("B-C", "brand", "correction", _period(costs.correction, beside_brand)),
        Tracker("RS", None, "svd", _period(costs.svd, to_spend)),
        Tracker("SRE", None, "eigh", _period(costs.eigh, to_spend)),
        Tracker(f"RS every {every}", None, "svd", every),
        Tracker(f"SRE every {every}", None, "eigh", every),
    ]


def _period(cost: float, to_spend: float) -> int:
    """Return the shortest period that costs no more than ``to_spend`` a step."""
    return max(1, math.ceil(cost / to_spend))


class Calls:
    """The pieces that trackers are made of, on one factor of order n."""

    def __init__(self, settings: Settings, n: int, seed: int) -> None:
        self._settings = settings
        self._generator = torch.Generator().manual_seed(seed)
        self.dense = torch.zeros(n, n)

    def average(self, columns: Tensor) -> None:
        """Update the dense average."""
        gram_ema_(self.dense, columns, self._settings.decay, 1 - self._settings.decay)

    def brand(self, factor: brandla.LowRankEigh, columns: Tensor) -> Factor:
        """Return the exact update."""
        return brandla.eigh_update(factor, columns, decay=self._settings.decay, weight=1 - self._settings.decay)

    def root(self, factor: brandla.LowRankRoot, columns: Tensor, compress: Compress = "eigh") -> Factor:
        """Return the update of the square root."""
        decay = self._settings.decay
        return brandla.root_update(factor, columns, decay=decay, weight=1 - decay, compress=compress)

    def cholesky(self, factor: brandla.LowRankRoot, columns: Tensor) -> Factor:
        """Return it with no eigendecomposition."""
        return self.root(factor, columns, "cholesky")

    def svd(self, factor: Factor | None = None) -> Factor:
        """Decompose the average as RS does."""
        found = brandla.randomized_svd(self.dense, **self._randomized())
        return brandla.LowRankEigh(found.S, found.U)

    def eigh(self, factor: Factor | None = None) -> Factor:
        """Decompose the average as SRE does."""
        return brandla.randomized_eigh(self.dense, **self._randomized())

    def correction(self, factor: brandla.LowRankEigh) -> Factor:
        """Correct a random part of the columns."""
        rank = factor.rank
        chosen = torch.randperm(rank, generator=self._generator)[: math.ceil(self._settings.fraction * rank)]
        return ritz_correct(factor, self.dense, chosen)

    def _randomized(self) -> dict[str, int | torch.Generator]:
        settings = self._settings
        return {
            "rank": settings.rank,
            "oversample": settings.oversample,
            "power_iterations": settings.power_iterations,
            "generator": self._generator,
        }


class Kept:
    """The dense average of one factor, and what every tracker keeps of it."""

    def __init__(self, settings: Settings, n: int, seed: int, chosen: list[Tracker]) -> None:
        self._calls = Calls(settings, n, seed)
        self._trackers = chosen
        self.factors: dict[str, Factor] = {
            one.name: (brandla.LowRankRoot if one.update in ROOTS else brandla.LowRankEigh).zeros(n, settings.rank)
            for one in chosen
        }

    def absorb(self, step: int, columns: Tensor) -> None:
        """Take in the columns of a step."""
        self._calls.average(columns)
        for one in self._trackers:
            factor = self.factors[one.name]
            if one.update:
                factor = getattr(self._calls, one.update)(factor, columns)
            if one.due(step):
                factor = getattr(self._calls, str(one.renewal))(factor)
            self.factors[one.name] = factor


def measure_costs(settings: Settings, stream: list[Tensor]) -> Costs:
    """Time every piece, in turn, on a factor that has seen all but the last of some columns (n, k)."""
    n, last = stream[0].shape[0], stream[-1]
    calls = Calls(settings, n, seed=0)
    eigh, root = brandla.LowRankEigh.zeros(n, settings.rank), brandla.LowRankRoot.zeros(n, settings.rank)
    for columns in stream[:-1]:
        calls.average(columns)
        eigh, root = calls.brand(eigh, columns), calls.root(root, columns)
    pieces: dict[str, Callable[[], object]] = {
        "average": lambda: calls.average(last),
        "brand": lambda: calls.brand(eigh, last),
        "root": lambda: calls.root(root, last),
        "cholesky": lambda: calls.cholesky(root, last),
        "svd": calls.svd,
        "eigh": calls.eigh,
        "correction": lambda: calls.correction(eigh),
    }
    seconds = timing.alternating(pieces, settings.repeats)
    return Costs(**{name: 1e3 * timing.of_median(times).value for name, times in seconds.items()})
