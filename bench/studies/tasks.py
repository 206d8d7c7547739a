"""What the study of K-FAC trains: kinds of networks, each with data and a loss, and tasks of them with a target."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from sklearn.datasets import make_friedman1
from torch import Tensor, nn
from torch.nn import functional as F

from bench.frame.images import CLASSES, FIFTH, Images, apart, conv, fashion, mlp, seeded, standardised
from bench.studies import defaults
from brandla.demo.data import Split

NEIGHBOURS, ROWS = 8, 20_000


class Graph(nn.Module):
    """Two graph convolutions: means over the nearest neighbours in a batch, each before a Linear layer."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, CLASSES)

    def forward(self, nodes: Tensor) -> Tensor:
        near = torch.cdist(nodes, nodes).topk(min(NEIGHBOURS, len(nodes)), largest=False).indices
        hidden = self.first(nodes[near].mean(1)).relu()
        return self.second(hidden[near].mean(1))


@cache
def garments(folder: Path) -> Images:
    """Return Fashion-MNIST, standardised."""
    return standardised(fashion(folder), "cpu")


def letters(_: Path) -> Images:
    """Return windows of the documentation that comes with Python."""
    return _parted(defaults.text())


def friedman(_: Path) -> Images:
    """Return rows of ten numbers and Friedman's first function of five of them, with noise of deviation 1."""
    inputs, targets = make_friedman1(ROWS, noise=1.0, random_state=0)
    parts = (torch.as_tensor(part, dtype=torch.float32) for part in (inputs, targets[:, None]))
    return _parted(defaults.split(*((part - part.mean(0)) / part.std(0) for part in parts)))


def _parted(data: defaults.Data) -> Images:
    training, test = Split(*data[:2]), Split(*data[2:])
    return Images(training, test, *apart(training, FIFTH))


class Kind(NamedTuple):
    """A network, and what it learns."""

    words: str
    make: Callable[[int, int], nn.Module]  # from the numbers of a sample, and the width
    load: Callable[[Path], Images]
    judged: int  # of the samples that judge, the first so many do
    by_loss: bool = False  # the target is a loss that is not exceeded; else an accuracy
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    sharing: Literal["expand", "reduce"] = "reduce"  # of K-FAC: "expand" where each place has a loss of its own


KINDS = {
    "mlp": Kind("an MLP with two hidden layers of {width} on Fashion-MNIST", mlp, garments, 1000),
    "conv": Kind(
        "two convolutions of {width} channels and twice as many, and two Linear layers, on Fashion-MNIST",
        conv,
        garments,
        1000,
    ),
    "graph": Kind(
        f"two graph convolutions of width {{width}} over {NEIGHBOURS} nearest neighbours in a batch of Fashion-MNIST",
        Graph,
        garments,
        1000,
    ),
    "transformer": Kind(
        f"two causal layers of width {{width}} over {defaults.CONTEXT} letters of Python's own documentation",
        lambda _, width: defaults.Transformer(width),
        letters,
        100,
        by_loss=True,
        sharing="expand",
    ),
    "regression": Kind(
        f"an MLP with two hidden layers of {{width}} on Friedman's first function with noise, {ROWS} rows",
        lambda inputs, width: defaults.mlp(inputs, width, width, 1),
        friedman,
        2000,
        by_loss=True,
        loss=F.mse_loss,
    ),
}


@dataclass(frozen=True)
class Task:
    """A network, its target, and how long it may take to get there."""

    name: str  # as in the result file
    kind: str  # of ``KINDS``, as in ``--only``
    width: int
    batch: int
    steps: int  # of a run, and of a trial of the search, at most
    seconds: float  # of a run, at most; a trial has half of them
    target: float  # on the test samples; on those that validate, in the search
    follows: str = ""  # task whose numbers are taken; "" searches them
    rates: bool = False  # of a task that follows: whether rates are tried
    everyone: bool = False  # whether the methods that are elsewhere left out take part
    seeds: int = 3  # of the runs, the first so many
    cost: float = 1.0  # of a step, beside those of other tasks, for the progress bar

    @property
    def network(self) -> Kind:
        """What is trained."""
        return KINDS[self.kind]

    def data(self, folder: Path, device: str, most: int | None) -> Images:
        """Return the samples; of each part that is trained on the first ``most``."""
        judged = self.network.judged
        whole = zip(self.network.load(folder), (most, judged, most, judged), strict=True)
        return Images(*(Split(*(tensor[:limit].to(device) for tensor in part)) for part, limit in whole))

    def model(self, inputs: int, device: str, seed: int) -> nn.Module:
        """Return the network for samples of so many numbers, initialised from a seed."""
        return seeded(seed, self.network.make, inputs, self.width).to(device)

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split) -> float:
        """Return the loss or the accuracy that the target is set for."""
        outputs = model(split.images)
        loss = self.network.loss(outputs, split.labels)
        if not loss.isfinite():
            message = "diverged: the loss is not finite"
            raise RuntimeError(message)
        return float(loss) if self.network.by_loss else float((outputs.argmax(1) == split.labels).float().mean())

    def reached(self, score: float) -> bool:
        """Say whether a score is as good as the target."""
        return score <= self.target if self.network.by_loss else score >= self.target

    @property
    def goal(self) -> str:
        """The target in words."""
        return f"a loss of {self.target:g}" if self.network.by_loss else f"{100 * self.target:g} %"
