"""The methods, the three numbers that are searched for each of them, and the points at which all are tried alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.stats.qmc import Sobol
from torch import Tensor, nn
from torch.nn import functional as F

from bench.kfac_study.settings import Settings
from brandla.demo.data import Split
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, InverseFree, Randomized, Strategy

Numbers = dict[str, float]
# Of SINGD, which has β to search in its place.
DECAY = 0.95


@dataclass(frozen=True)
class Method:
    """One way to train.

    Parameters
    ----------
    name
        As in tables and pictures.
    cost
        Milliseconds of a step, roughly, for the progress bar.
    ranges
        Of each number that is searched, by its name: ends of a range that is covered evenly in the logarithm.
    strategy
        The K-FAC strategy; None where there is no preconditioner.
    adaptive
        AdamW in place of SGD.
    """

    name: str
    cost: float
    ranges: dict[str, tuple[float, float]]
    strategy: Callable[[Settings, Numbers], Strategy] | None = None
    adaptive: bool = False

    def numbers(self, point: list[float]) -> Numbers:
        """Return the numbers at a point of the unit cube."""
        return {
            name: float(f"{low * (high / low) ** part:.3g}")
            for part, (name, (low, high)) in zip(point, self.ranges.items(), strict=True)
        }


KFAC_RANGES = {"rate": (0.01, 0.3), "damping": (0.003, 0.1), "1 − ρ": (0.02, 0.2)}
SINGD_RANGES = {"rate": (0.01, 0.3), "damping": (0.003, 0.1), "β": (0.05, 0.5)}

METHODS = (
    Method("SGD", 4, {"rate": (0.01, 0.3), "1 − momentum": (0.03, 0.3), "weight decay": (1e-5, 1e-3)}),
    Method("AdamW", 5, {"rate": (3e-4, 0.01), "1 − β₁": (0.03, 0.3), "weight decay": (1e-3, 0.1)}, adaptive=True),
    Method("K-FAC", 26, KFAC_RANGES, lambda of, _: Exact(of.renew_every)),
    Method("RS-KFAC", 19, KFAC_RANGES, lambda of, _: Randomized(of.rank, method="svd", inverse_every=of.renew_every)),
    Method("SRE-KFAC", 17, KFAC_RANGES, lambda of, _: Randomized(of.rank, inverse_every=of.renew_every)),
    Method("B-KFAC", 30, KFAC_RANGES, lambda of, _: Brand(of.rank)),
    Method("B-KFAC, sketched", 18, KFAC_RANGES, lambda of, _: Brand(of.rank, sketch=of.rank // 2)),
    Method("B-R-KFAC", 34, KFAC_RANGES, lambda of, _: BrandRandomized(of.rank, overwrite_every=of.overwrite_every)),
    Method("B-KFAC-C", 41, KFAC_RANGES, lambda of, _: BrandCorrected(of.rank, correct_every=of.renew_every)),
    Method("SINGD", 20, SINGD_RANGES, lambda of, by: InverseFree(rate=by["β"], preconditioner_every=of.singd_every)),
)


def points(settings: Settings) -> list[list[float]]:
    """Return the points of the unit cube at which every method is tried: a scrambled Sobol sequence.

    Of 2^m points, the coordinates of each one number fall one into each of 2^m equal parts.
    """
    dimensions = len(KFAC_RANGES)
    with warnings.catch_warnings():
        # Another count than 2^m is allowed, and less balanced.
        warnings.filterwarnings("ignore", message="The balance properties of Sobol")
        return Sobol(dimensions, rng=settings.search_seed).random(settings.trials).tolist()


class Trainer:
    """A model with its optimizer and, where the method has one, its preconditioner."""

    def __init__(self, method: Method, model: nn.Module, numbers: Numbers, settings: Settings, seed: int) -> None:
        self.model = model
        self.optimizer = _optimizer(method, model, numbers)
        self.preconditioner: KFAC | None = None
        if method.strategy is not None:
            self.preconditioner = KFAC(
                model,
                method.strategy(settings, numbers),
                damping=numbers["damping"],
                clip=settings.clip,
                decay=1 - numbers["1 − ρ"] if "1 − ρ" in numbers else DECAY,
                sharing="reduce",
                seed=seed,
            )

    def step(self, batch: Split) -> None:
        """Take one training step."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(batch.images), batch.labels).backward()
        if self.preconditioner is not None:
            with warnings.catch_warnings():
                # Small factors get a dense strategy: the memory says what that takes.
                warnings.filterwarnings("ignore", message="KFAC: some factors are too small")
                self.preconditioner.step()
        self.optimizer.step()

    def kept_bytes(self) -> tuple[int, int]:
        """Return what the factors take, and what the optimizer keeps."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        kept = sum(value.numel() * value.element_size() for value in states if isinstance(value, Tensor))
        return self.preconditioner.report().bytes if self.preconditioner is not None else 0, kept


def _optimizer(method: Method, model: nn.Module, numbers: Numbers) -> torch.optim.Optimizer:
    if method.strategy is not None:
        return torch.optim.SGD(model.parameters(), numbers["rate"])
    rate, decay = numbers["rate"], numbers["weight decay"]
    if method.adaptive:
        return torch.optim.AdamW(model.parameters(), rate, betas=(1 - numbers["1 − β₁"], 0.999), weight_decay=decay)
    return torch.optim.SGD(model.parameters(), rate, momentum=1 - numbers["1 − momentum"], weight_decay=decay)
