"""The methods of the training study: how each is built for a model, and the rates its search tries."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from brandla.demo.data import Split
from brandla.demo.settings import Settings, TrainingSettings
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Randomized, Strategy


@dataclass(frozen=True)
class Method:
    """One way to train.

    Parameters
    ----------
    name
        As in tables and in the picture.
    rates
        Ends of the decade of learning rates that the search covers.
    cost
        Relative cost of one step, for the progress bar; about milliseconds.
    strategy
        The K-FAC strategy; None where there is no preconditioner.
    adaptive
        AdamW; else SGD, with momentum where there is no preconditioner.
    """

    name: str
    rates: tuple[float, float]
    cost: float
    strategy: Callable[[TrainingSettings], Strategy] | None = None
    adaptive: bool = False

    def grid(self, trials: int) -> list[float]:
        """Return ``trials`` rates, evenly spaced in their logarithm; of two, those a third from the ends."""
        low, high = self.rates
        places = [1 / 3, 2 / 3] if trials == 2 else [trial / max(trials - 1, 1) for trial in range(trials)]
        return [float(f"{low * (high / low) ** place:.3g}") for place in places]


KFAC_RATES = (0.03, 0.3)

METHODS = (
    Method("SGD, momentum", (0.05, 0.5), 3),
    Method("AdamW", (0.002, 0.02), 4, adaptive=True),
    Method("K-FAC", KFAC_RATES, 20, lambda of: Exact(inverse_every=of.inverse_every)),
    Method("RS-KFAC", KFAC_RATES, 14, lambda of: Randomized(of.rank, method="svd", inverse_every=of.inverse_every)),
    Method("SRE-KFAC", KFAC_RATES, 12, lambda of: Randomized(of.rank, method="eigh", inverse_every=of.inverse_every)),
    Method("B-KFAC", KFAC_RATES, 16, lambda of: Brand(of.rank)),
    Method("B-KFAC, sketched", KFAC_RATES, 12, lambda of: Brand(of.rank, sketch=of.rank // 2)),
    Method("B-R-KFAC", KFAC_RATES, 30, lambda of: BrandRandomized(of.rank)),
    Method("B-KFAC-C", KFAC_RATES, 30, lambda of: BrandCorrected(of.rank)),
)


class Trainer:
    """A model with its optimizer and, where the method has one, its preconditioner."""

    def __init__(self, method: Method, model: nn.Module, rate: float, settings: Settings) -> None:
        self.model = model
        self.preconditioner: KFAC | None = None
        if method.adaptive:
            self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), rate)
        else:
            momentum = 0.9 if method.strategy is None else 0.0
            self._optimizer = torch.optim.SGD(model.parameters(), rate, momentum=momentum)
        if method.strategy is not None:
            options = settings.training
            strategy = method.strategy(options)
            self.preconditioner = KFAC(
                model, strategy, damping=options.damping, clip=options.clip, decay=settings.decay, factor_every=1
            )

    def step(self, batch: Split) -> None:
        """Take one training step."""
        self._optimizer.zero_grad()
        F.cross_entropy(self.model(batch.images), batch.labels).backward()
        if self.preconditioner is not None:
            self._precondition(self.preconditioner)
        self._optimizer.step()

    @staticmethod
    def _precondition(preconditioner: KFAC) -> None:
        with warnings.catch_warnings():
            # The factors of orders 65 and 10 get a dense strategy, which the memory table shows.
            warnings.filterwarnings("ignore", message="KFAC: some factors are too small")
            preconditioner.step()
