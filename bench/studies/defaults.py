"""What bounds a step: K-FAC clipped by RMS, KL and spectral norm, untuned and tuned, and AdamW, on ten small tasks."""

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


@dataclass(frozen=True)
class Settings:
    """Steps and batch of a run, seeds, what widths are divided by, and whether rates are tried."""

    steps: int = 200
    batch: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    narrower: int = 1
    tuned: bool = True


# Of each method the rate that is taken untuned, then the others, and the options of KFAC; None for AdamW.
METHODS: dict[str, tuple[tuple[float, ...], dict[str, Any] | None]] = {
    "AdamW": ((1e-3, 3e-3, 1e-2), None),
    "RMS .07": ((0.03, 0.01, 0.1, 0.3), {"clip_by": "rms", "clip": 0.07}),
    "KL .01": ((1.0, 0.1, 0.3, 3.0), {"clip_by": "kl", "clip": 0.01}),
    "spectral .3": ((1.0, 0.1, 0.3, 3.0), {"clip_by": "spectral", "clip": 0.3}),
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


TASKS: dict[str, tuple[Callable[[], Data], Callable[[int], nn.Module], int]] = {
    "digits MLP 256": (partial(table, "digits"), lambda width: mlp(64, width, width, 10), 256),
    "digits MLP 1024": (partial(table, "digits"), lambda width: mlp(64, width, width, 10), 1024),
    "digits MLP 2048": (partial(table, "digits"), lambda width: mlp(64, width, 10), 2048),
    "digits CNN": (partial(table, "digits"), cnn, 256),
    "digits graph": (partial(table, "digits"), Graph, 512),
    "breast cancer MLP": (partial(table, "breast_cancer"), lambda width: mlp(30, width, width, 2), 256),
    "wine MLP": (partial(table, "wine"), lambda width: mlp(13, width, width, 3), 512),
    "diabetes MLP": (partial(table, "diabetes"), lambda width: mlp(10, width, width, 1), 256),
    "letters transformer": (text, Transformer, 256),
    "letters MLP": (lambda: split(text()[0], text()[1][:, -1]), letters_mlp, 512),
}


def run(task: str, method: str, rate: float, seed: int, settings: Settings, device: str) -> Iterator[Row]:
    """Yield the least validation loss of a run with a rate that falls to 0 along a cosine; infinite if it diverged."""
    data, make, width = TASKS[task]
    torch.manual_seed(seed)
    model = make(width // settings.narrower).to(device)
    inputs, targets, *validation = (part.to(device) for part in data())
    options = METHODS[method][1]
    preconditioner = None if options is None else KFAC(model, **options, seed=seed)
    optimizer = (torch.optim.AdamW if options is None else torch.optim.SGD)(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    loss = nn.functional.cross_entropy if targets.dtype == torch.int64 else nn.functional.mse_loss
    best = math.inf
    warnings.filterwarnings("ignore", message="KFAC: some factors are too small")
    for step in range(1, settings.steps + 1):
        chosen = torch.randint(len(inputs), (settings.batch,)).to(device)
        optimizer.zero_grad()
        loss(model(inputs[chosen]), targets[chosen]).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        schedule.step()
        if step % max(settings.steps // 10, 1) == 0:
            with torch.no_grad():
                found = float(loss(model(validation[0][:1000]), validation[1][:1000]))
            best = min(best, found if math.isfinite(found) else math.inf)
    yield {"loss": best if math.isfinite(best) else None}


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


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield mean validation losses over the seeds: at the first rate, and at the best of all of them."""
    runs = pd.DataFrame(content.get("runs", []))
    if runs.empty:
        return
    means = runs.fillna({"loss": math.inf}).groupby(["task", "method", "rate"])["loss"].mean().unstack("rate")
    cells = []
    for task in runs["task"].unique():
        own = {method: means.loc[(task, method)].dropna() for method in METHODS if (task, method) in means.index}
        pairs = {method: (row.get(METHODS[method][0][0], math.nan), row.min()) for method, row in own.items()}
        cells.append({"task": task} | {method: f"{first:.3f} / {best:.3f}" for method, (first, best) in pairs.items()})
    yield "Validation loss, untuned / best rate", pd.DataFrame(cells).fillna("–")


def section(content: Row, machine: str) -> Iterator[str]:
    """Yield the section of ``docs/measurements.md``."""
    yield "### What bounds a step of K-FAC\n\n`defaults.json`, of `python -m bench.studies.defaults`: least validation"
    yield "loss, the mean of seeds, at the untuned rate and at the best of those tried, chosen by the same loss."
    yield pages.caveats(content["facts"])
    for _, cells in shown(content):
        yield "\n" + pages.markdown(cells)


STUDY = Study("defaults", {"quick": Settings(2, 16, (0,), 16, tuned=False), "usual": Settings()}, pieces, shown)

if __name__ == "__main__":
    command(STUDY, __doc__)()
