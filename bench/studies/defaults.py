"""Clips of a step on ten small tasks: K-FAC clipped by RMS, KL and spectral norm, and AdamW, untuned and tuned.

Figures are losses after so many steps, so the machine's other work makes no difference.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from bench.frame.samples import shuffled, table, text
from bench.frame.study import Piece, Row, Study, Tables, command, sweep
from bench.gpu.device import Device
from bench.studies.networks import Graph, Transformer, letters_mlp, strided, two_hidden
from brandla.demo.data import Split, mlp
from brandla.demo.studies import Trainer
from brandla.kfac import KFAC

JUDGED = 300  # only the first so many validation samples are judged


@dataclass(frozen=True)
class Settings:
    """Steps of a run, the largest batch, seeds, the divisor of all widths, and whether rates are tried."""

    steps: int = 100
    batch: int = 128
    seeds: tuple[int, ...] = (0, 1)
    narrower: int = 1
    tuned: bool = True


SHARE = 0.95  # a run is good enough if it reduces the loss by this share of the best run's reduction
# The untuned rate of each method, then its other rates, and the options of KFAC; None for AdamW.
METHODS: dict[str, tuple[tuple[float, ...], dict[str, Any] | None]] = {
    "AdamW": ((1e-3, 3e-3, 1e-2), None),
    "RMS .07": ((0.03, 0.1, 0.3, 1.0), {"clip_by": "rms", "clip": 0.07}),
    "KL .01": ((1.0, 0.3, 3.0), {"clip_by": "kl", "clip": 0.01}),
    "spectral .3": ((1.0, 0.3, 3.0), {"clip_by": "spectral", "clip": 0.3}),
}


digits = partial(table, "digits")
# Each window with the one letter after it.
after_letters = lambda: shuffled(text()[0].images, text()[0].labels[:, -1])
# Data, network, its width, and the batch.
TASKS: dict[str, tuple[Callable[[], tuple[Split, Split]], Callable[[int, int], nn.Module], int, int]] = {
    "digits MLP 256": (digits, two_hidden, 256, 128),
    "digits MLP 1024": (digits, two_hidden, 1024, 128),
    "digits MLP 2048": (digits, lambda inputs, width: mlp(inputs, width, 10), 2048, 128),
    "digits CNN": (digits, strided, 256, 64),
    "digits graph": (digits, Graph, 512, 128),
    "breast cancer MLP": (partial(table, "breast_cancer"), partial(two_hidden, outputs=2), 256, 128),
    "wine MLP": (partial(table, "wine"), partial(two_hidden, outputs=3), 512, 128),
    "diabetes MLP": (partial(table, "diabetes"), partial(two_hidden, outputs=1), 256, 128),
    "letters transformer": (text, Transformer, 128, 32),
    "letters MLP": (after_letters, letters_mlp, 512, 128),
}


def pieces(settings: Settings, device: Device, _: Tables) -> Iterator[Piece]:
    """Return the runs of all tasks, seed by seed."""
    most = None if settings.tuned else 1
    tried = [(method, rate) for method, (rates, _) in METHODS.items() for rate in rates[:most]]
    values = [(task, method, rate, seed) for seed in settings.seeds for task in TASKS for method, rate in tried]
    return sweep("runs", ("task", "method", "rate", "seed"), values, run, settings, str(device.tensors))


def run(task: str, method: str, rate: float, seed: int, settings: Settings, device: str) -> Iterator[Row]:
    """Yield the validation loss before a run and its least in the run (none if it diverged); rates fall by a cosine."""
    data, make, width, batch = TASKS[task]
    training, judged = (Split(*(part.to(device) for part in split)) for split in data())
    torch.manual_seed(seed)
    model = make(training.images.shape[1], width // settings.narrower).to(device)
    options = METHODS[method][1]
    kfac = None if options is None else KFAC(model, **options, seed=seed)
    optimizer = (torch.optim.AdamW if options is None else torch.optim.SGD)(model.parameters(), rate)
    loss = F.cross_entropy if training.labels.dtype == torch.int64 else F.mse_loss
    trainer = Trainer(model, optimizer, kfac, loss)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)

    def validated() -> float:
        with torch.no_grad():
            return float(loss(model(judged.images[:JUDGED]), judged.labels[:JUDGED]))

    before, best = validated(), math.inf
    for step in range(1, settings.steps + 1):
        chosen = torch.randint(len(training.labels), (min(batch, settings.batch),)).to(device)
        trainer.step(Split(training.images[chosen], training.labels[chosen]))
        schedule.step()
        if step % max(settings.steps // 10, 1) == 0:
            # The minimum with NaN is the least loss so far.
            best = min(best, validated())
    yield {"before": before, "loss": best}


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield how often one rate for all tasks was good enough, and the mean losses: untuned, and at the best rate."""
    if not content.get("runs"):
        return
    # Mean losses over the seeds, infinite if one diverged: a row for each task, a column for each method and rate.
    runs = pd.DataFrame(content["runs"]).fillna({"loss": math.inf})
    means = runs.pivot_table("loss", "task", ["method", "rate"], sort=False)
    before = runs.groupby("task")["before"].mean()
    # Reductions of the loss over the best run's.
    shares = means.rsub(before, axis=0).div(before - means.min(axis=1), axis=0)
    percent = pd.DataFrame({"median share": shares.median(), "least share": shares.min()}).clip(lower=0)
    percent = percent.map("{:.1%}".format)
    percent.insert(0, f"tasks at {100 * SHARE:g} %", shares.ge(SHARE).sum())
    yield f"One rate for all {len(shares)} tasks", percent.reset_index()
    # The first rate of a method is the untuned one.
    losses = means.T.groupby(level="method", sort=False).agg([lambda rates: rates.iloc[0], "min"]).T
    cells = losses.map(lambda loss: f"{loss:.3f}" if math.isfinite(loss) else "–").groupby(level=0, sort=False)
    yield "Validation loss, untuned / best rate", cells.agg(" / ".join).reset_index()


SIZES = {"quick": Settings(2, 16, (0,), 16, tuned=False), "usual": Settings()}
STUDY = Study("defaults", SIZES, pieces, shown, threads=1)

if __name__ == "__main__":
    command(STUDY, __doc__)()
