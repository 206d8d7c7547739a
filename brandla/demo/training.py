"""What the demo is set to, and its training study: a rate searched for each method, then each from every seed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import mean
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brandla.demo import data
from brandla.demo.data import Parts, Split
from brandla.demo.frame import Piece, Row, Tables
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Randomized, Strategy

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides the machine."""

    device: str = "cpu"
    quick: bool = False
    width: int = 512
    batch: int = 128
    decay: float = 0.95
    warmup: int = 5  # steps whose times are left out

    # Tracking: the decompositions to compare with are timed at every so many steps.
    ranks: tuple[int, ...] = (32, 64, 128)
    headline_rank: int = 64
    tracking_steps: int = 200
    reference_every: int = 12
    tracking_rate: float = 1e-3
    tracking_seed: int = 0

    # Training: the search has a seed that no measured run has, and tries so many rates over each method's decade.
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    search_seed: int = 1000
    search_steps: int = 50
    trials: int = 4
    evaluate_every: int = 2
    rank: int = 64
    damping: float = 0.03
    clip: float = 0.07
    inverse_every: int = 10
    target: float = 0.97


SHORT = {"tracking_steps": 60, "reference_every": 10, "steps": 40, "search_steps": 12, "trials": 2}
QUICK = Settings("cpu", quick=True, ranks=(64,), seeds=(0,), **SHORT)


class Trainer(NamedTuple):
    """A model with its optimizer and, where the method has one, its preconditioner."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    preconditioner: KFAC | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def step(self, batch: Split) -> None:
        """Take one training step."""
        self.optimizer.zero_grad()
        self.loss(self.model(batch.images), batch.labels).backward()
        if self.preconditioner is not None:
            with warnings.catch_warnings():
                # Small factors get a dense strategy, and the memory says what that takes.
                warnings.filterwarnings("ignore", message="KFAC: some factors are too small")
                self.preconditioner.step()
        self.optimizer.step()


def timed(function: Callable[[], Result], device: str) -> tuple[Result, float]:
    """Call ``function`` and return its result with the milliseconds it took, the device idle before and after."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = perf_counter()
    result = function()
    synchronize()
    return result, 1e3 * (perf_counter() - start)


def follow(
    trainer: Trainer,
    batches: Iterable[Split],
    judge: Callable[[nn.Module], Row],
    looks: Container[int],
    seconds: float = math.inf,
    until: Callable[[Row], bool] = lambda look: False,
) -> Row:
    """Train on the batches, and return the milliseconds of each step, and what ``judge`` said after the steps to look.

    Only the steps are timed. A run ends, with a look, after so many seconds, and at a look that ``until`` is true of.
    What ``judge`` or a step raises as RuntimeError ends it as well, and is its ``failure``.
    """
    took: list[float] = []
    run: Row = {"milliseconds": took, "evaluations": [], "finished": False, "failure": None}
    for step, batch in enumerate(batches, start=1):
        try:
            took.append(timed(partial(trainer.step, batch), str(batch.images.device))[1])
            spent = sum(took) / 1e3
            if step in looks or spent >= seconds:
                run["evaluations"].append({"step": step, "seconds": spent, **judge(trainer.model)})
                if spent >= seconds or until(run["evaluations"][-1]):
                    break
        except RuntimeError as error:
            return run | {"failure": f"step {step}: {str(error).splitlines()[0]}"}
    return run | {"finished": True}


class Method(NamedTuple):
    """One way to train."""

    name: str  # as in tables and in the picture
    rates: tuple[float, float]  # ends of the decade of learning rates that the search covers
    strategy: Callable[[Settings], Strategy] | None = None  # of K-FAC, before SGD without momentum

    def grid(self, trials: int) -> list[float]:
        """Return ``trials`` rates, evenly spaced in their logarithm; of two, those a third from the ends."""
        low, high = self.rates
        places = [1 / 3, 2 / 3] if trials == 2 else [trial / max(trials - 1, 1) for trial in range(trials)]
        return [float(f"{low * (high / low) ** place:.3g}") for place in places]


KFAC_RATES = (0.03, 0.3)
METHODS = (
    Method("SGD, momentum", (0.05, 0.5)),
    Method("AdamW", (0.002, 0.02)),
    Method("K-FAC", KFAC_RATES, lambda of: Exact(inverse_every=of.inverse_every)),
    Method("RS-KFAC", KFAC_RATES, lambda of: Randomized(of.rank, method="svd", inverse_every=of.inverse_every)),
    Method("SRE-KFAC", KFAC_RATES, lambda of: Randomized(of.rank, method="eigh", inverse_every=of.inverse_every)),
    Method("B-KFAC", KFAC_RATES, lambda of: Brand(of.rank)),
    Method("B-KFAC, sketched", KFAC_RATES, lambda of: Brand(of.rank, sketch=of.rank // 2)),
    Method("B-R-KFAC", KFAC_RATES, lambda of: BrandRandomized(of.rank)),
    Method("B-KFAC-C", KFAC_RATES, lambda of: BrandCorrected(of.rank)),
)


def pieces(settings: Settings, digits: Parts, tables: Tables) -> Iterator[Piece]:
    """Yield the trials of the search, then the runs seed by seed: an interrupted study compares all methods."""

    def tried(method: Method, rate: float) -> list[Row]:
        """Return the mean validation accuracy along a short run; 0 if it failed."""
        run = train(method, rate, settings.search_seed, settings.search_steps, digits[2:], settings)
        score = 0.0 if run["failure"] else mean(look["accuracy"] for look in run["evaluations"])
        return [{"score": score, "failure": run["failure"]}]

    def trained(method: Method, seed: int) -> list[Row]:
        """Return a run at the method's best rate."""
        trials = [row for row in tables["trials"] if row["method"] == method.name]
        rate = max(trials, key=lambda row: row["score"])["rate"]
        return [train(method, rate, seed, settings.steps, digits[:2], settings)]

    for method in METHODS:
        for rate in method.grid(settings.trials):
            key = {"method": method.name, "rate": rate}
            yield Piece("trials", key, partial(tried, method, rate), settings.search_steps)
    for seed in settings.seeds:
        for method in METHODS:
            key = {"method": method.name, "seed": seed}
            yield Piece("runs", key, partial(trained, method, seed), settings.steps)


def train(method: Method, rate: float, seed: int, steps: int, parts: tuple[Split, Split], settings: Settings) -> Row:
    """Train the network of a seed on the first part, judged on the second; return also the bytes of the factors."""
    model = data.seeded(seed, data.mlp, 64, settings.width, settings.width, 10).to(settings.device)
    weights, kfac = model.parameters(), None
    if method.strategy is not None:
        kfac = KFAC(model, method.strategy(settings), damping=settings.damping, clip=settings.clip, decay=settings.decay)
    if method.name == "AdamW":
        trainer = Trainer(model, torch.optim.AdamW(weights, rate))
    else:
        trainer = Trainer(model, torch.optim.SGD(weights, rate, momentum=0.9 if kfac is None else 0.0), kfac)
    every, (training, judged) = settings.evaluate_every, parts
    batches = data.batches(training, settings.batch, steps, seed)
    judge = lambda model: {"accuracy": data.accuracy(model, judged)}  # noqa: E731
    run = follow(trainer, batches, judge, {*range(every, steps, every), steps})
    keep = ("layer", "side", "n", "strategy", "rank", "bytes", "dense_bytes")
    factors = kfac.report().factors if kfac is not None and run["finished"] else ()
    memory = [{name: getattr(factor, name) for name in keep} for factor in factors]
    return {"rate": rate, "memory": memory or None, **run}
