"""The two studies of the demo: tracking a layer's factor while the network learns, and training by every method."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import mean
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brandla
from brandla.demo import data
from brandla.demo.data import Parts, Split
from brandla.demo.frame import Piece, Row, Tables
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Randomized, Strategy

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on, apart from the machine."""

    device: str = "cpu"
    quick: bool = False
    width: int = 512
    batch: int = 128
    decay: float = 0.95
    warmup: int = 5  # steps whose times are left out

    # Tracking. The decompositions to compare with are timed every ``reference_every`` steps.
    ranks: tuple[int, ...] = (32, 64, 128)
    headline_rank: int = 64
    tracking_steps: int = 200
    reference_every: int = 12
    tracking_rate: float = 1e-3
    tracking_seed: int = 0

    # Training. The search has a seed of its own, and tries ``trials`` rates over each method's decade.
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


def pieces(settings: Settings, digits: Parts, tables: Tables) -> Iterator[Piece]:
    """Yield the tracking, the trials, then the runs, seed by seed: a study that ends early compares all methods."""

    def trial(method: Method, rate: float) -> list[Row]:
        """Return the mean validation accuracy over a short run, or 0 if it failed."""
        run = train(method, rate, settings.search_seed, settings.search_steps, digits[2:], settings)
        score = 0.0 if run["failure"] else mean(evaluation["accuracy"] for evaluation in run["evaluations"])
        return [{"score": score, "failure": run["failure"]}]

    def measured_run(method: Method, seed: int) -> list[Row]:
        """Return a run at the method's best rate."""
        trials = [row for row in tables["trials"] if row["method"] == method.name]
        rate = max(trials, key=lambda row: row["score"])["rate"]
        return [train(method, rate, seed, settings.steps, digits[:2], settings)]

    steps, rows = settings.tracking_steps, settings.tracking_steps * len(UPDATES) * len(settings.ranks)
    # A tracking step takes about as long as six training steps.
    yield Piece("tracking", {"seed": settings.tracking_seed}, partial(track, settings, digits), 6.0 * steps, rows)
    for method in METHODS:
        for rate in method.grid(settings.trials):
            key = {"method": method.name, "rate": rate}
            yield Piece("trials", key, partial(trial, method, rate), settings.search_steps)
    for seed in settings.seeds:
        for method in METHODS:
            key = {"method": method.name, "seed": seed}
            yield Piece("runs", key, partial(measured_run, method, seed), settings.steps)


def timed(function: Callable[[], Result], device: str) -> tuple[Result, float]:
    """Return the result of ``function`` and the milliseconds it took. The device is idle before and after the call."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = perf_counter()
    result = function()
    synchronize()
    return result, 1e3 * (perf_counter() - start)


# --- Training


class Trainer(NamedTuple):
    """A model with its optimizer, and with a preconditioner if the method has one."""

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
                # Small factors get a dense strategy. The memory column of the table counts them.
                warnings.filterwarnings("ignore", message="KFAC: some factors are too small")
                self.preconditioner.step()
        self.optimizer.step()


def train_and_evaluate(
    trainer: Trainer,
    batches: Iterable[Split],
    evaluate: Callable[[nn.Module], Row],
    at_steps: Container[int],
    seconds: float = math.inf,
    until: Callable[[Row], bool] = lambda evaluation: False,
) -> Row:
    """Train on the batches. Return the milliseconds of each step, and the evaluations after the steps ``at_steps``.

    Only the steps are timed. A run ends, with an evaluation, after so many seconds, and at an evaluation for which
    ``until`` is true. A RuntimeError of ``evaluate`` or a step ends the run too, and becomes its ``failure``.
    """
    milliseconds: list[float] = []
    run: Row = {"milliseconds": milliseconds, "evaluations": [], "finished": False, "failure": None}
    for step, batch in enumerate(batches, start=1):
        try:
            milliseconds.append(timed(partial(trainer.step, batch), str(batch.images.device))[1])
            spent = sum(milliseconds) / 1e3
            if step in at_steps or spent >= seconds:
                run["evaluations"].append({"step": step, "seconds": spent, **evaluate(trainer.model)})
                if spent >= seconds or until(run["evaluations"][-1]):
                    break
        except RuntimeError as error:
            return run | {"failure": f"step {step}: {str(error).splitlines()[0]}"}
    return run | {"finished": True}


class Method(NamedTuple):
    """A method of training: an optimizer, or SGD without momentum after K-FAC with a strategy."""

    name: str  # as in the tables and the picture
    rates: tuple[float, float]  # ends of the decade of learning rates that the search covers
    strategy: Callable[[Settings], Strategy] | None = None

    def grid(self, trials: int) -> list[float]:
        """Return ``trials`` rates, evenly spaced in their logarithm. Two rates lie a third away from the ends."""
        rates = np.geomspace(*self.rates, 4)[1:3] if trials == 2 else np.geomspace(*self.rates, trials)
        return [float(f"{rate:.3g}") for rate in rates]


KFAC_RATES = (0.03, 0.3)
METHODS = (
    Method("SGD, momentum", (0.05, 0.5)),
    Method("AdamW", (0.002, 0.02)),
    Method("K-FAC", KFAC_RATES, lambda s: Exact(inverse_every=s.inverse_every)),
    Method("RS-KFAC", KFAC_RATES, lambda s: Randomized(s.rank, method="svd", inverse_every=s.inverse_every)),
    Method("SRE-KFAC", KFAC_RATES, lambda s: Randomized(s.rank, method="eigh", inverse_every=s.inverse_every)),
    Method("B-KFAC", KFAC_RATES, lambda s: Brand(s.rank)),
    Method("B-KFAC, sketched", KFAC_RATES, lambda s: Brand(s.rank, sketch=s.rank // 2)),
    Method("B-R-KFAC", KFAC_RATES, lambda s: BrandRandomized(s.rank)),
    Method("B-KFAC-C", KFAC_RATES, lambda s: BrandCorrected(s.rank)),
)


def train(method: Method, rate: float, seed: int, steps: int, parts: tuple[Split, Split], settings: Settings) -> Row:
    """Train the network of a seed on the first part, and evaluate it on the second. Report the factors' memory too."""
    model, kfac = data.seeded(seed, data.mlp, 64, settings.width, settings.width, 10).to(settings.device), None
    if method.strategy is not None:
        strategy = method.strategy(settings)
        kfac = KFAC(model, strategy, damping=settings.damping, clip=settings.clip, decay=settings.decay)
    if method.name == "AdamW":
        trainer = Trainer(model, torch.optim.AdamW(model.parameters(), rate))
    else:
        momentum = 0.9 if kfac is None else 0.0
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), rate, momentum), kfac)
    batches = data.batches(parts[0], settings.batch, steps, seed)
    at_steps = {*range(settings.evaluate_every, steps, settings.evaluate_every), steps}
    run = train_and_evaluate(trainer, batches, lambda model: {"accuracy": data.accuracy(model, parts[1])}, at_steps)
    fields = ("layer", "side", "n", "strategy", "rank", "bytes", "dense_bytes")
    factors = kfac.report().factors if kfac is not None and run["finished"] else ()
    memory = [{name: getattr(factor, name) for name in fields} for factor in factors]
    return {"rate": rate, "memory": memory or None, **run}


# --- Tracking

UPDATES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "root_update": (brandla.LowRankRoot, brandla.root_update),
    "eigh_update": (brandla.LowRankEigh, brandla.eigh_update),
}


def track(settings: Settings, digits: Parts) -> Iterator[Row]:
    """Train by AdamW. Yield a row for each step and factor, and a row for each timed call to compare with.

    ``trace``, ``frobenius`` and ``spectral`` are norms of M − M̂; ``trace`` is the trace norm. With ``best``, they are
    the errors of the best approximation of that rank, by Eckart and Young. With ``whole``, they are norms of M.
    """
    n, device, decay, seed = settings.width + 1, settings.device, settings.decay, settings.tracking_seed
    model = data.seeded(seed, data.mlp, 64, settings.width, settings.width, 10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), settings.tracking_rate)
    truth = torch.zeros(n, n, dtype=torch.float64, device=device)
    tracked = {
        (name, rank): brandla.track(kind.zeros(n, rank, device=device))
        for rank in settings.ranks
        for name, (kind, _) in UPDATES.items()
    }
    generator = torch.Generator(device).manual_seed(seed)
    for step, batch in enumerate(data.batches(digits.training, settings.batch, settings.tracking_steps, seed), start=1):
        columns, _ = observe_step(model, optimizer, batch)
        truth = decay * truth + (1 - decay) * (columns.double() @ columns.double().mT)
        spectrum = torch.linalg.eigvalsh(truth).flip(0).clamp_min(0)
        for (name, rank), before in tracked.items():
            update = partial(UPDATES[name][1], before, columns, decay=decay, weight=1 - decay)
            tracked[name, rank], took = timed(update, device)
            about = {"step": step, "method": name, "rank": rank, "milliseconds": took}
            yield about | _errors(truth, spectrum, tracked[name, rank], rank)
        if step % settings.reference_every == 0:
            # The other calls need the dense average, so its update is timed first.
            dense, weights = truth.float(), {"beta": decay, "alpha": 1 - decay}
            calls: dict[tuple[str, int | None], Callable[[], Any]] = {
                ("dense average", None): partial(torch.addmm, dense, columns, columns.mT, **weights),
                ("torch.linalg.eigh", None): partial(torch.linalg.eigh, dense),
            }
            for rank in settings.ranks:
                calls["randomized_eigh", rank] = partial(brandla.randomized_eigh, dense, rank, generator=generator)
                calls["torch.svd_lowrank", rank] = partial(torch.svd_lowrank, dense, rank + 10, niter=2)
            for (name, rank_or_none), call in calls.items():
                row: Row = {"step": step, "method": name, "rank": rank_or_none, "milliseconds": None}
                # LAPACK's float32 eigensolver is known to fail on such factors.
                with suppress(RuntimeError):
                    row["milliseconds"] = timed(call, device)[1]
                yield row


def observe_step(model: nn.Sequential, optimizer: torch.optim.Optimizer, batch: Split) -> tuple[Tensor, Tensor]:
    """Take a training step, and return the new columns of both factors of the middle Linear, over the root of k.

    These are the inputs (width + 1, k) of k images, with a last row for the bias, and the output gradients (width, k).
    """
    hidden = model[:2](batch.images)
    outputs = model[2](hidden)
    outputs.retain_grad()
    optimizer.zero_grad()
    F.cross_entropy(model[3:](outputs), batch.labels).backward()
    optimizer.step()
    root = len(hidden) ** 0.5
    inputs = torch.cat([hidden.detach(), hidden.new_ones(len(hidden), 1)], dim=1)
    # The loss is a mean, so the gradient of one sample's loss is k times the gradient that backward leaves.
    return inputs.mT / root, outputs.grad.mT * root


def _errors(truth: Tensor, spectrum: Tensor, tracked: brandla.Tracked[Any], rank: int) -> Row:
    """Return the errors, the running bound, and the loss of orthogonality of the eigenvectors."""
    factor = tracked.lowrank
    vectors = (factor if isinstance(factor, brandla.LowRankEigh) else factor.to_eigh()).eigenvectors.double()
    gram = vectors.mT @ vectors
    # Zero columns count as orthonormal.
    defect = gram - torch.diag((gram.diagonal() > 0.5).to(gram.dtype))
    row: Row = {"bound": float(tracked.error_bound), "orthogonality": float(torch.linalg.eigvalsh(defect).abs().max())}
    error = torch.linalg.eigvalsh(truth - factor.dense().double())
    for prefix, values in (("", error), ("best ", spectrum[rank:]), ("whole ", spectrum)):
        norms = {"trace": values.abs().sum(), "frobenius": values.norm(), "spectral": values.abs().max()}
        row |= {f"{prefix}{name}": float(norm) for name, norm in norms.items()}
    return row
