"""What bounds a step: K-FAC clipped by RMS, KL and spectral norm, untuned and tuned, and AdamW, on ten small tasks.

Figures are losses after so many steps: how busy the machine is makes no difference.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pydoc_data import topics
from typing import Any

import pandas as pd
import torch
from sklearn import datasets
from torch import Tensor, nn

from bench.frame import pages
from bench.frame.study import Piece, Row, Study, command
from bench.gpu.device import Device
from brandla.kfac import KFAC

CONTEXT, LETTERS, NEIGHBOURS = 32, 96, 8
# Of the samples that validate, the first so many do.
JUDGED = 300


@dataclass(frozen=True)
class Settings:
    """Steps of a run, the largest batch, seeds, what widths are divided by, and whether rates are tried."""

    steps: int = 100
    batch: int = 128
    seeds: tuple[int, ...] = (0, 1)
    narrower: int = 1
    tuned: bool = True


# What counts as reached: this share of what the best run of all takes off the loss.
SHARE = 0.95
# Of each method the rate that is taken untuned, then the others, and the options of KFAC; None for AdamW.
METHODS: dict[str, tuple[tuple[float, ...], dict[str, Any] | None]] = {
    "AdamW": ((1e-3, 3e-3, 1e-2), None),
    "RMS .07": ((0.03, 0.1, 0.3, 1.0), {"clip_by": "rms", "clip": 0.07}),
    "KL .01": ((1.0, 0.3, 3.0), {"clip_by": "kl", "clip": 0.01}),
    "spectral .3": ((1.0, 0.3, 3.0), {"clip_by": "spectral", "clip": 0.3}),
}


Data = tuple[Tensor, Tensor, Tensor, Tensor]


def split(inputs: Tensor, targets: Tensor) -> Data:
    """Return what is trained on, then the fifth that validates."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    kept, left = order.tensor_split([len(inputs) * 4 // 5])
    return inputs[kept], targets[kept], inputs[left], targets[left]


@cache
def table(name: str) -> Data:
    """Return a data set of scikit-learn's, standardised; the targets of a regression too."""
    inputs, targets = map(torch.as_tensor, getattr(datasets, f"load_{name}")(return_X_y=True))
    columns = [inputs.float(), targets[:, None].float()]
    inputs, values = ((part - part.mean(0)) / part.std(0).clamp_min(1e-6) for part in columns)
    return split(inputs, values if name == "diabetes" else targets)


@cache
def text() -> Data:
    """Windows of the documentation that comes with the interpreter, and the letter after each place."""
    letters = "".join(topics.topics.values()).encode("ascii", "ignore")[: 4000 * (CONTEXT + 1)]
    codes = torch.tensor(list(letters)).sub(31).clamp(0, LETTERS - 1)
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return split(windows[:, :-1], windows[:, 1:])


class Transformer(nn.Module):
    """Two causal layers over letters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, width), nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in range(2)]
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, LETTERS)

    def forward(self, codes: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=codes.device)
        hidden = self.letters(codes) + self.places
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden).mT


class Graph(nn.Module):
    """Two graph convolutions over the nearest neighbours in a batch of digits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, nodes: Tensor) -> Tensor:
        near = torch.cdist(nodes, nodes).topk(min(NEIGHBOURS, len(nodes)), largest=False).indices
        hidden = self.first(nodes[near].mean(1)).relu()
        return self.second(hidden[near].mean(1))


def mlp(*widths: int) -> nn.Module:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*[part for pair in pairs for part in (nn.Linear(*pair), nn.ReLU())][:-1])


def cnn(width: int) -> nn.Module:
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, width), nn.ReLU(), nn.Linear(width, 10))


def letters_mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(LETTERS, 16), nn.Flatten(), mlp(16 * CONTEXT, width, LETTERS))


# Data, network, its width, and the batch.
TASKS: dict[str, tuple[Callable[[], Data], Callable[[int], nn.Module], int, int]] = {
    "digits MLP 256": (partial(table, "digits"), lambda width: mlp(64, width, width, 10), 256, 128),
    "digits MLP 1024": (partial(table, "digits"), lambda width: mlp(64, width, width, 10), 1024, 128),
    "digits MLP 2048": (partial(table, "digits"), lambda width: mlp(64, width, 10), 2048, 128),
    "digits CNN": (partial(table, "digits"), cnn, 256, 64),
    "digits graph": (partial(table, "digits"), Graph, 512, 128),
    "breast cancer MLP": (partial(table, "breast_cancer"), lambda width: mlp(30, width, width, 2), 256, 128),
    "wine MLP": (partial(table, "wine"), lambda width: mlp(13, width, width, 3), 512, 128),
    "diabetes MLP": (partial(table, "diabetes"), lambda width: mlp(10, width, width, 1), 256, 128),
    "letters transformer": (text, Transformer, 128, 32),
    "letters MLP": (lambda: split(text()[0], text()[1][:, -1]), letters_mlp, 512, 128),
}


def run(task: str, method: str, rate: float, seed: int, settings: Settings, device: str) -> Iterator[Row]:
    """Yield the validation loss before a run and the least in it (None if it diverged); rates fall along a cosine."""
    data, make, width, batch = TASKS[task]
    torch.manual_seed(seed)
    model = make(width // settings.narrower).to(device)
    inputs, targets, *validation = (part.to(device) for part in data())
    options = METHODS[method][1]
    preconditioner = None if options is None else KFAC(model, **options, seed=seed)
    optimizer = (torch.optim.AdamW if options is None else torch.optim.SGD)(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    loss = nn.functional.cross_entropy if targets.dtype == torch.int64 else nn.functional.mse_loss

    def validated() -> float:
        with torch.no_grad():
            return float(loss(model(validation[0][:JUDGED]), validation[1][:JUDGED]))

    before, best = validated(), math.inf
    warnings.filterwarnings("ignore", message="KFAC: some factors are too small")
    for step in range(1, settings.steps + 1):
        chosen = torch.randint(len(inputs), (min(batch, settings.batch),)).to(device)
        optimizer.zero_grad()
        loss(model(inputs[chosen]), targets[chosen]).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        schedule.step()
        if step % max(settings.steps // 10, 1) == 0:
            # Beside NaN the least so far stays.
            best = min(best, validated())
    yield {"before": before, "loss": best if math.isfinite(best) else None}


def pieces(settings: Settings, device: Device) -> list[Piece]:
    """Return the runs of all tasks, seed by seed."""
    found = []
    for seed in settings.seeds:
        for task in TASKS:
            for method, (rates, _) in METHODS.items():
                for rate in rates if settings.tuned else rates[:1]:
                    key = {"task": task, "method": method, "rate": rate, "seed": seed}
                    measure = lambda tables, tick, key=key: run(**key, settings=settings, device=str(device.tensors))
                    found.append(Piece("runs", key, 1.0, measure))
    return found


def means(content: Row) -> pd.DataFrame:
    """Return mean losses over the seeds, infinite where one diverged: a row a task, a column a method and rate."""
    runs = pd.DataFrame(content["runs"]).fillna({"loss": math.inf})
    return runs.pivot_table("loss", "task", ["method", "rate"], sort=False)


def reached(content: Row) -> pd.DataFrame:
    """Return the share of what the best run of a task takes off its loss, for each method and rate."""
    found, before = means(content), pd.DataFrame(content["runs"]).groupby("task")["before"].mean()
    return found.rsub(before, axis=0).div(before - found.min(axis=1), axis=0)


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield how often a rate for all tasks was enough, and the mean losses: untuned, and at the best of the rates."""
    if not content.get("runs"):
        return
    shares = reached(content)
    counted = {
        "method": shares.columns.get_level_values("method"),
        "rate": shares.columns.get_level_values("rate"),
        f"tasks at {100 * SHARE:g} %": shares.ge(SHARE).sum().to_list(),
        "median share": shares.median().clip(lower=0).map("{:.1%}".format).to_list(),
        "least share": shares.min().clip(lower=0).map("{:.1%}".format).to_list(),
    }
    yield f"One rate for all {len(shares)} tasks", pd.DataFrame(counted)
    cells = pd.DataFrame(index=means(content).index)
    for method, own in means(content).T.groupby("method", sort=False):
        first = own.loc[method, METHODS[method][0][0]]
        cells[method] = first.map(_loss) + " / " + own.min().map(_loss)
    yield "Validation loss, untuned / best rate", cells.reset_index()


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def guide(content: Row) -> str:
    """Return the table of ``docs/kfac.md``: on how many tasks each clip was enough, at one rate for all."""
    title, cells = next(iter(shown(content)))
    told = f"{content['settings']['steps']} steps, {seeds(content)} (`make study-defaults`)"
    return f"{title}, {told}:{pages.caveats(content['facts'])}\n\n{pages.markdown(cells)}"


def seeds(content: Row) -> str:
    """Say how many seeds each case has."""
    if not content.get("runs"):
        return "no run was made"
    counts = pd.DataFrame(content["runs"]).groupby(["task", "method", "rate"]).size()
    return f"seeds: {counts.min()}" + (f" to {counts.max()}" if counts.max() > counts.min() else "")


def section(content: Row, machine: str) -> Iterator[str]:
    """Yield the section of ``docs/measurements/kfac.md``."""
    yield "### What bounds a step of K-FAC\n\n`defaults.json`, of `make study-defaults`: the least validation loss in"
    yield f"{content['settings']['steps']} steps, the mean of all seeds ({seeds(content)}), with a rate"
    yield "that falls to 0 along a cosine. The share is that of what the best method at its best rate takes off the"
    yield f"initial loss; {100 * SHARE:g} % of it counts as reached. The untuned rate is the first of each method."
    yield pages.caveats(content["facts"])
    for title, cells in shown(content):
        yield f"\n#### {title}\n"
        yield pages.markdown(cells)


SIZES = {"quick": Settings(2, 16, (0,), 16, tuned=False), "usual": Settings()}
STUDY = Study("defaults", SIZES, pieces, shown, threads=1)

if __name__ == "__main__":
    command(STUDY, __doc__)()
