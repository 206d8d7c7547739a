"""The training study: a learning rate searched for each method, then every method from every seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import mean
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brandla.demo import data
from brandla.demo.data import Parts, Split
from brandla.demo.frame import Piece, Row, Tables, Tick
from brandla.demo.settings import Settings
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Randomized, Strategy

Result = TypeVar("Result")


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
    run: Row, trainer: Trainer, batches: Iterable[Split], judge: Callable[[nn.Module], float], every: int
) -> Iterator[None]:
    """Train on the batches, yielding after each step; ``run`` gets the milliseconds of each and the accuracies.

    Only the steps are timed. What ``judge`` or a step raises as RuntimeError ends the run and is its ``failure``.
    """
    run |= {"milliseconds": [], "evaluations": [], "finished": False, "failure": None}
    batches = list(batches)
    device = str(batches[0].images.device)
    for step, batch in enumerate(batches, start=1):
        try:
            _, took = timed(lambda: trainer.step(batch), device)  # noqa: B023
            run["milliseconds"].append(took)
            if step % every == 0 or step == len(batches):
                look = {"step": step, "seconds": sum(run["milliseconds"]) / 1e3, "accuracy": judge(trainer.model)}
                run["evaluations"].append(look)
        except RuntimeError as error:
            run["failure"] = f"step {step}: {str(error).splitlines()[0]}"
            return
        yield
    run["finished"] = True


@dataclass(frozen=True)
class Method:
    """One way to train."""

    name: str  # as in tables and in the picture
    rates: tuple[float, float]  # ends of the decade of learning rates that the search covers
    cost: float  # of one step, for the progress bar; about milliseconds
    strategy: Callable[[Settings], Strategy] | None = None  # of K-FAC; None without a preconditioner
    adaptive: bool = False  # AdamW; else SGD, with momentum where there is no preconditioner

    def grid(self, trials: int) -> list[float]:
        """Return ``trials`` rates, evenly spaced in their logarithm; of two, those a third from the ends."""
        low, high = self.rates
        places = [1 / 3, 2 / 3] if trials == 2 else [trial / max(trials - 1, 1) for trial in range(trials)]
        return [float(f"{low * (high / low) ** place:.3g}") for place in places]

    def trainer(self, rate: float, seed: int, settings: Settings) -> Trainer:
        """Return the network of a seed with what trains it."""
        model = data.network(settings.width, settings.device, seed)
        if self.adaptive:
            return Trainer(model, torch.optim.AdamW(model.parameters(), rate))
        if self.strategy is None:
            return Trainer(model, torch.optim.SGD(model.parameters(), rate, momentum=0.9))
        strategy, damping = self.strategy(settings), settings.damping
        kfac = KFAC(model, strategy, damping=damping, clip=settings.clip, decay=settings.decay, factor_every=1)
        return Trainer(model, torch.optim.SGD(model.parameters(), rate), kfac)


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


def pieces(settings: Settings, digits: Parts) -> list[Piece]:
    """Return the trials of the search, then the runs seed by seed: an interrupted study compares all methods."""

    def trial(method: Method, rate: float) -> Piece:
        key = {"method": method.name, "rate": rate}
        measure = lambda _, tick: tried(method, rate, settings, digits, tick)  # noqa: E731
        return Piece("trials", key, method.cost * settings.search_steps, measure)

    def run(method: Method, seed: int) -> Piece:
        key = {"method": method.name, "seed": seed}
        measure = lambda tables, tick: trained(method, seed, settings, digits, tables, tick)  # noqa: E731
        return Piece("runs", key, method.cost * settings.steps, measure)

    trials = [trial(method, rate) for method in METHODS for rate in method.grid(settings.trials)]
    return trials + [run(method, seed) for seed in settings.seeds for method in METHODS]


def tried(method: Method, rate: float, settings: Settings, digits: Parts, tick: Tick) -> Iterator[Row]:
    """Train briefly, and yield the mean validation accuracy along the way; 0 if it failed."""
    run: Row = {}
    trainer = method.trainer(rate, settings.search_seed, settings)
    stream = data.batches(digits.search_training, settings.batch, settings.search_steps, settings.search_seed)
    judge = lambda model: data.accuracy(model, digits.search_validation)  # noqa: E731
    for _ in follow(run, trainer, stream, judge, settings.evaluate_every):
        tick(1 / settings.search_steps)
    score = 0.0 if run["failure"] else mean(look["accuracy"] for look in run["evaluations"])
    yield {"score": score, "failure": run["failure"]}


def trained(method: Method, seed: int, settings: Settings, digits: Parts, tables: Tables, tick: Tick) -> Iterator[Row]:
    """Yield a run at the method's best rate, with the bytes of its factors."""
    trials = [row for row in tables["trials"] if row["method"] == method.name]
    run: Row = {"rate": max(trials, key=lambda row: row["score"])["rate"], "memory": None}
    trainer = method.trainer(run["rate"], seed, settings)
    stream = data.batches(digits.training, settings.batch, settings.steps, seed)
    judge = lambda model: data.accuracy(model, digits.test)  # noqa: E731
    try:
        for _ in follow(run, trainer, stream, judge, settings.evaluate_every):
            tick(1 / settings.steps)
        if trainer.preconditioner is not None and run["finished"]:
            factors = trainer.preconditioner.report().factors
            keep = ("layer", "side", "n", "strategy", "rank", "bytes", "dense_bytes")
            run["memory"] = [{name: getattr(factor, name) for name in keep} for factor in factors]
    finally:
        yield run
