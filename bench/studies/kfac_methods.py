"""What the study of K-FAC on images runs over: the tasks, and the methods with the three numbers searched for each."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats.qmc import Sobol
from torch import nn

from bench.frame.images import DIGITS, FASHION, conv, mlp, seeded
from bench.studies.peers import SOAP, Muon, Shampoo
from brandla.demo.training import Trainer
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, InverseFree, Randomized, Strategy

Numbers = dict[str, float]
# Of SINGD, which has β to search in its place.
DECAY = 0.95


@dataclass(frozen=True)
class Task:
    """Images, a network that learns them, and how long it may."""

    name: str  # as in the result file
    images: Literal["digits", "fashion-mnist"]  # as in ``--only``
    network: Literal[
        "mlp", "conv"
    ]  # pixels-width-width-10, or two convolutions of ``width`` and 2 · ``width`` channels
    width: int
    batch: int  # samples of a step
    steps: int  # of a run
    search_steps: int  # of a trial of the search
    evaluate_every: int  # steps between two looks at the accuracy
    target: float  # accuracy on the test images that steps and seconds are counted to
    cost: float = 1.0  # of a step, beside those of other tasks, for the progress bar

    def model(self, pixels: int, device: str, seed: int) -> nn.Module:
        """Return the network for images of so many pixels, initialised from ``seed``."""
        return seeded(seed, mlp if self.network == "mlp" else conv, pixels, self.width).to(device)


@dataclass(frozen=True)
class Settings:
    """One study. Every method has ``trials`` trials a task, at the same points of its ranges."""

    tasks: tuple[Task, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 8
    # Of the trials' points, networks and batches: none of the seeds that are measured.
    search_seed: int = 1000
    rank: int = 64
    clip: float = 0.07
    # Steps between renewals of K-FAC, RS-KFAC, SRE-KFAC and B-KFAC-C, and between overwrites of B-R-KFAC.
    renew_every: int = 10
    overwrite_every: int = 50
    # SINGD takes in no data between its updates, and is given more of them.
    singd_every: int = 5
    # Of each part of a set, the first so many images are taken; None for all.
    most_images: int | None = None


USUAL = Settings(
    (
        Task(FASHION, FASHION, "mlp", 512, 128, 300, 100, 10, 0.85, cost=1.4),
        Task(DIGITS, DIGITS, "mlp", 512, 128, 100, 50, 2, 0.97),
    )
)
FULL = Settings(
    (
        Task(FASHION, FASHION, "mlp", 2048, 512, 2000, 500, 20, 0.88, cost=4),
        Task("fashion-mnist-conv", FASHION, "conv", 32, 128, 2000, 500, 20, 0.90, cost=4),
        Task(DIGITS, DIGITS, "mlp", 1024, 128, 200, 100, 2, 0.97),
    ),
    seeds=(0, 1, 2, 3, 4),
    trials=16,
    rank=128,
)
QUICK = Settings(
    (
        Task(FASHION, FASHION, "mlp", 48, 16, 4, 2, 2, 0.3),
        Task("fashion-mnist-conv", FASHION, "conv", 4, 16, 3, 2, 2, 0.3),
        Task(DIGITS, DIGITS, "mlp", 48, 16, 8, 4, 2, 0.3),
    ),
    seeds=(0, 1),
    trials=2,
    rank=8,
    renew_every=3,
    overwrite_every=4,
    singd_every=2,
    most_images=256,
)


@dataclass(frozen=True)
class Method:
    """One way to train."""

    name: str  # as in tables and pictures
    cost: float  # milliseconds of a step, roughly, for the progress bar
    # Of each number that is searched, by its name: ends of a range that is covered evenly in the logarithm.
    ranges: dict[str, tuple[float, float]]
    strategy: Callable[[Settings, Numbers], Strategy] | None = None  # of K-FAC, where there is a preconditioner
    adaptive: bool = False  # AdamW in place of SGD
    # Another optimizer, from the weights, the rate, momentum and decay.
    optimizer: Callable[[Iterable[nn.Parameter], float, float, float, Settings], torch.optim.Optimizer] | None = None

    def numbers(self, point: list[float]) -> Numbers:
        """Return the numbers at a point of the unit cube."""
        return spread(self.ranges, point)

    def trainer(self, model: nn.Module, numbers: Numbers, settings: Settings, seed: int) -> Trainer:
        """Return a model with what trains it."""
        rate = numbers["rate"]
        if self.strategy is not None:
            decay = 1 - numbers["1 − ρ"] if "1 − ρ" in numbers else DECAY
            strategy, damping = self.strategy(settings, numbers), numbers["damping"]
            kfac = KFAC(model, strategy, damping=damping, clip=settings.clip, decay=decay, sharing="reduce", seed=seed)
            return Trainer(model, torch.optim.SGD(model.parameters(), rate), kfac)
        shrink = numbers["weight decay"]
        if self.optimizer is not None:
            return Trainer(model, self.optimizer(model.parameters(), rate, 1 - numbers["1 − β₁"], shrink, settings))
        if self.adaptive:
            betas = (1 - numbers["1 − β₁"], 0.999)
            return Trainer(model, torch.optim.AdamW(model.parameters(), rate, betas=betas, weight_decay=shrink))
        momentum = 1 - numbers["1 − momentum"]
        return Trainer(model, torch.optim.SGD(model.parameters(), rate, momentum=momentum, weight_decay=shrink))


def spread(ranges: dict[str, tuple[float, float]], point: list[float]) -> Numbers:
    """Return the numbers at a point of the unit cube, each evenly in the logarithm between the ends of its range."""
    return {
        name: float(f"{low * (high / low) ** part:.3g}")
        for part, (name, (low, high)) in zip(point, ranges.items(), strict=True)
    }


KFAC_RANGES = {"rate": (0.01, 0.3), "damping": (0.003, 0.1), "1 − ρ": (0.02, 0.2)}
MATRIX_RANGES = {"rate": (3e-4, 0.01), "1 − β₁": (0.03, 0.3), "weight decay": (1e-3, 0.1)}
SINGD_RANGES = {"rate": (0.01, 0.3), "damping": (0.003, 0.1), "β": (0.05, 0.5)}

METHODS = (
    Method("SGD", 4, {"rate": (0.01, 0.3), "1 − momentum": (0.03, 0.3), "weight decay": (1e-5, 1e-3)}),
    Method("AdamW", 5, {"rate": (3e-4, 0.01), "1 − β₁": (0.03, 0.3), "weight decay": (1e-3, 0.1)}, adaptive=True),
    Method("Muon", 8, MATRIX_RANGES, optimizer=lambda of, rate, beta, decay, _: Muon(of, rate, beta, decay)),
    Method(
        "Shampoo",
        20,
        MATRIX_RANGES,
        optimizer=lambda of, rate, beta, decay, by: Shampoo(of, rate, (beta, 0.99), decay, by.renew_every),
    ),
    Method(
        "SOAP",
        20,
        MATRIX_RANGES,
        optimizer=lambda of, rate, beta, decay, by: SOAP(of, rate, (beta, 0.99), decay, by.renew_every),
    ),
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
