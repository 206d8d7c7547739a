"""The study of K-FAC: its tasks with their targets, its methods with three numbers to search, and its settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from scipy.stats.qmc import LatinHypercube
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from bench.frame.samples import friedman, standardised_fashion, text, with_validation
from bench.studies.networks import Graph, Transformer, conv, two_hidden
from bench.studies.peers import SOAP, Maker, Muon, Shampoo
from brandla.demo.data import Parts, Split, seeded
from brandla.demo.studies import Trainer
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, InverseFree, Randomized, Strategy

Numbers = dict[str, float]
EXPONENTS = (0.0, 0.5, 1.0)  # a task that follows another of width w₀ tries its rate times (w₀ / width) to these powers


class Kind(NamedTuple):
    """A network, and the data that it learns."""

    make: Callable[[int, int], nn.Module]  # from the size of a sample, and the width
    load: Callable[[Path], Parts] = standardised_fashion
    judged: int = 1000  # only the first so many test and validation samples are judged
    by_loss: bool = False  # the target is a loss; else an accuracy
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    sharing: Literal["expand", "reduce"] = "reduce"  # of K-FAC: "expand" if each position has a loss of its own


# ``docs/kfac-study.md`` explains them.
KINDS = {
    "mlp": Kind(two_hidden),
    "conv": Kind(conv),
    "graph": Kind(Graph),
    "transformer": Kind(Transformer, lambda _: with_validation(*text()), 100, by_loss=True, sharing="expand"),
    "regression": Kind(partial(two_hidden, outputs=1), lambda _: with_validation(*friedman()), 2000, True, F.mse_loss),
}


@dataclass(frozen=True)
class Task:
    """A network, its target, and the steps and seconds to get there."""

    name: str  # as in the result file
    kind: str  # of ``KINDS``, as in ``--only``
    width: int
    batch: int
    steps: int  # the most of a run, and of a trial of the search
    seconds: float  # the most of a run; a trial has a third of them
    target: float  # on the test samples; in the search, on the validation samples
    follows: str = ""  # the task whose numbers are taken; "" searches them
    rates: bool = False  # whether a task that follows another tries rates
    everyone: bool = False  # whether the methods that other tasks leave out take part
    seeds: int = 3  # the runs have the first so many seeds of the settings
    cost: float = 1.0  # of a step, over those of other tasks, for the progress bar

    @property
    def network(self) -> Kind:
        return KINDS[self.kind]

    def data(self, folder: Path, device: str, most: int | None) -> Parts:
        """Return the samples; the parts for training have the first ``most``."""
        judged = self.network.judged
        whole = zip(self.network.load(folder), (most, judged, most, judged), strict=True)
        return Parts(*(Split(*(tensor[:limit].to(device) for tensor in part)) for part, limit in whole))

    def model(self, like: Tensor, seed: int) -> nn.Module:
        """Return the network for samples like these, initialised from a seed."""
        return seeded(seed, self.network.make, like.shape[1], self.width).to(like.device)

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split) -> float:
        """Return the loss or the accuracy, whichever the target is for."""
        outputs = model(split.images)
        loss = self.network.loss(outputs, split.labels)
        if not loss.isfinite():
            message = "diverged: the loss is not finite"
            raise RuntimeError(message)
        return float(loss) if self.network.by_loss else float((outputs.argmax(1) == split.labels).float().mean())

    def reached(self, score: float) -> bool:
        return score <= self.target if self.network.by_loss else score >= self.target

    @property
    def goal(self) -> str:
        return f"a loss of {self.target:g}" if self.network.by_loss else f"{100 * self.target:g} %"


@dataclass(frozen=True)
class Settings:
    """The settings of the study. Every method has ``trials`` trials a task, at the same points of its ranges."""

    tasks: tuple[Task, ...]
    seeds: tuple[int, ...] = (1, 2)
    trials: int = 5
    search_seed: int = 1000  # the seed of the trials' points, networks and batches, which no measured run has
    rank: int = 64
    clip: float = 0.07
    # Steps between renewals of K-FAC, RS-KFAC, SRE-KFAC, B-KFAC-C, Shampoo and SOAP; between overwrites of B-R-KFAC.
    renew_every: int = 10
    overwrite_every: int = 50
    singd_every: int = 5  # SINGD takes in data only at its updates, so it has more of them
    # Steps before the first look at a score; and the part by which the steps grow until each further look.
    look_after: int = 4
    look_every: float = 1 / 6
    # Widths at which the cost of a step is measured, with batches of an eighth, and the seconds for each measurement.
    widths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    cost_seconds: float = 1.0
    most: int | None = None  # the most training samples; None for all


USUAL = Settings(
    (
        Task("MLP 512", "mlp", 512, 128, 300, 5, 0.82, everyone=True),
        Task("MLP 1024", "mlp", 1024, 128, 300, 7, 0.82, follows="MLP 512", rates=True, cost=3),
        Task("MLP 256", "mlp", 256, 128, 300, 4, 0.82, follows="MLP 1024", cost=0.5),
        Task("MLP 2048", "mlp", 2048, 256, 300, 9, 0.82, follows="MLP 1024", seeds=1, cost=10),
        Task("CNN", "conv", 8, 128, 300, 6, 0.80),
        Task("transformer", "transformer", 128, 32, 300, 7, 2.55, seeds=1, cost=2),
        Task("regression", "regression", 256, 128, 400, 5, 0.07, cost=0.5),
        Task("graph network", "graph", 512, 256, 300, 5, 0.74),
    )
)
FULL = Settings(
    (
        Task("MLP 1024", "mlp", 1024, 256, 3000, 120, 0.88, everyone=True),
        Task("MLP 2048", "mlp", 2048, 512, 3000, 240, 0.88, follows="MLP 1024", rates=True, seeds=5, cost=4),
        Task("MLP 512", "mlp", 512, 128, 3000, 60, 0.88, follows="MLP 2048", seeds=5),
        Task("MLP 4096", "mlp", 4096, 1024, 3000, 480, 0.88, follows="MLP 2048", cost=16),
        Task("CNN", "conv", 32, 128, 3000, 120, 0.90, everyone=True, seeds=5, cost=4),
        Task("transformer", "transformer", 512, 128, 3000, 240, 2.0, everyone=True, seeds=5, cost=4),
        Task("regression", "regression", 1024, 256, 3000, 60, 0.05, everyone=True, seeds=5),
        Task("graph network", "graph", 2048, 512, 3000, 120, 0.76, everyone=True, seeds=5),
    ),
    seeds=(1, 2, 3, 4, 5),
    trials=16,
    rank=128,
)
QUICK = replace(
    USUAL,
    tasks=tuple(
        replace(task, width=max(task.width // 16, 4), batch=16, steps=4, target=4.5 if task.network.by_loss else 0.1,
                seconds=60, everyone=True)
        for task in USUAL.tasks
    ),
    seeds=(0, 1),
    trials=2,
    rank=8,
    renew_every=3,
    overwrite_every=4,
    singd_every=2,
    look_after=1,
    widths=(64, 128),
    most=256,
)  # fmt: skip


# --- Methods


@dataclass(frozen=True)
class Method:
    """A way to train."""

    name: str  # as in tables and pictures
    words: str  # of the table of methods
    cost: float  # rough milliseconds of a step, for the progress bar
    ranges: dict[str, tuple[float, float]]  # the range of each number that is searched, evenly in the logarithm
    renews: str = ""  # the setting with the steps between expensive ones
    usual: bool = True  # takes part in every task; else only in those for everyone
    priced: bool = True  # whether the cost of its step is measured by width
    package: str = "torch"  # that it needs
    refuses: str = ""  # the kind of network that it cannot train

    @property
    def installed(self) -> bool:
        return util.find_spec(self.package) is not None

    def numbers(self, point: list[float]) -> Numbers:
        """Return this method's numbers at a point of the unit cube."""
        return numbers_at(self.ranges, point)

    def trainer(self, model: nn.Module, numbers: Numbers, settings: Settings, task: Task, seed: int) -> Trainer | Maker:
        loss = task.network.loss
        if "weight decay" in numbers:
            return Trainer(model, optimizer(self.name, model.parameters(), numbers, settings), None, loss)
        # SINGD searches β in place of ρ.
        rate, damping, weight = numbers["rate"], numbers["damping"], numbers.get("1 − ρ", 0.05)
        if self.name not in STRATEGIES:
            return Maker(model, rate, loss, task.batch, settings.renew_every, damping, weight)
        options = {"clip": settings.clip, "decay": 1 - weight, "sharing": task.network.sharing, "seed": seed}
        kfac = KFAC(model, STRATEGIES[self.name](settings, numbers), damping=damping, **options)
        return Trainer(model, SGD(model.parameters(), rate), kfac, loss)


def numbers_at(ranges: dict[str, tuple[float, float]], point: list[float]) -> Numbers:
    """Return the numbers at a point of the unit cube, which covers each range evenly in the logarithm."""
    parts = zip(point, ranges.items(), strict=True)
    return {name: float(f"{low * (high / low) ** part:.3g}") for part, (name, (low, high)) in parts}


def points(settings: Settings) -> list[list[float]]:
    """Return the points at which every method is tried: a Latin hypercube, which covers each range evenly."""
    return LatinHypercube(len(KFAC_RANGES), rng=settings.search_seed).random(settings.trials).tolist()


def optimizer(name: str, weights: Any, numbers: Numbers, settings: Any) -> torch.optim.Optimizer:
    """Return an optimizer without K-FAC, with the numbers of a trial."""
    rate, decay, every = numbers["rate"], numbers["weight decay"], settings.renew_every
    momentum = 1 - numbers["1 − momentum" if name == "SGD" else "1 − β₁"]
    optimizers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "SGD": lambda: SGD(weights, rate, momentum, weight_decay=decay),
        "AdamW": lambda: AdamW(weights, rate, (momentum, 0.999), weight_decay=decay),
        "Muon": lambda: Muon(weights, rate, momentum, decay),
        "Shampoo": lambda: Shampoo(weights, rate, (momentum, 0.99), decay, every),
        "SOAP": lambda: SOAP(weights, rate, (momentum, 0.99), decay, every),
        "SOAP, every step": lambda: SOAP(weights, rate, (momentum, 0.99), decay, 1),
    }
    return optimizers[name]()


# The strategies of K-FAC, which preconditions SGD without momentum.
STRATEGIES: dict[str, Callable[[Settings, Numbers], Strategy]] = {
    "K-FAC": lambda settings, _: Exact(settings.renew_every),
    "RS-KFAC": lambda settings, _: Randomized(settings.rank, method="svd", inverse_every=settings.renew_every),
    "SRE-KFAC": lambda settings, _: Randomized(settings.rank, inverse_every=settings.renew_every),
    "B-KFAC": lambda settings, _: Brand(settings.rank),
    "B-KFAC, sketched": lambda settings, _: Brand(settings.rank, sketch=settings.rank // 2),
    "B-R-KFAC": lambda settings, _: BrandRandomized(settings.rank, overwrite_every=settings.overwrite_every),
    "B-KFAC-C": lambda settings, _: BrandCorrected(settings.rank, correct_every=settings.renew_every),
    "SINGD": lambda settings, numbers: InverseFree(rate=numbers["β"], preconditioner_every=settings.singd_every),
}
SGD_RANGES = {"rate": (0.01, 0.3), "1 − momentum": (0.03, 0.3), "weight decay": (1e-5, 1e-3)}
ADAM_RANGES = {"rate": (3e-4, 0.01), "1 − β₁": (0.03, 0.3), "weight decay": (1e-3, 0.1)}
KFAC_RANGES = {"rate": (0.01, 0.3), "damping": (0.003, 0.1), "1 − ρ": (0.02, 0.2)}
SINGD_RANGES = {"rate": (0.01, 0.3), "damping": (0.003, 0.1), "β": (0.05, 0.5)}
ASDL_RANGES = {"rate": (0.003, 0.1), "damping": (0.003, 0.1), "1 − ρ": (0.02, 0.2)}
PACE, EXTRA = "renew_every", {"usual": False, "priced": False}
# This package cannot train the Linear layer inside torch's attention.
OF_PACKAGE = "K-FAC of that package, inverses every {renew_every} steps, without a clip"
METHODS = (
    Method("SGD", "with momentum", 4, SGD_RANGES),
    Method("AdamW", "β₂ 0.999", 5, ADAM_RANGES),
    Method("Muon", "five steps of Newton and Schulz, as long as AdamW's", 80, ADAM_RANGES, priced=False),
    Method("Shampoo", "roots every {renew_every} steps", 20, ADAM_RANGES, PACE, priced=False),
    Method("SOAP", "QR every {renew_every} steps", 20, ADAM_RANGES, PACE),
    Method("SOAP, every step", "QR at every step", 60, ADAM_RANGES, priced=False),
    Method("K-FAC", "`Exact`, every {renew_every} steps", 26, KFAC_RANGES, PACE),
    Method("RS-KFAC", '`Randomized`, `"svd"`, every {renew_every} steps', 19, KFAC_RANGES, PACE),
    Method("B-KFAC", "`Brand`", 30, KFAC_RANGES),
    Method("B-KFAC, sketched", "`Brand`, batches brought down to half the rank by random signs", 18, KFAC_RANGES),
    Method("SINGD", "`InverseFree`, dense, moved every {singd_every} steps", 20, SINGD_RANGES, "singd_every"),
    Method("SRE-KFAC", '`Randomized`, `"eigh"`, every {renew_every} steps', 17, KFAC_RANGES, **EXTRA),
    Method("B-R-KFAC", "`BrandRandomized`, overwritten every {overwrite_every} steps", 34, KFAC_RANGES, **EXTRA),
    Method("B-KFAC-C", "`BrandCorrected`, corrected every {renew_every} steps", 41, KFAC_RANGES, **EXTRA),
    Method("asdfghjkl", OF_PACKAGE, 30, ASDL_RANGES, priced=False, package="asdl", refuses="transformer"),
)
