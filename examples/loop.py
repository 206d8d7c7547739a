"""The training loop of the examples: the two lines that switch K-FAC on, and the table of a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from brandla.kfac import KFAC, Strategy

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A network with its data: endless batches, and a held-out batch."""

    model: Callable[[], nn.Module]
    batches: Callable[[], Iterator[Batch]]
    held_out: Batch
    loss: Callable[[Tensor, Tensor], Tensor]
    sharing: str = "expand"


@dataclass(frozen=True)
class Outcome:
    """Loss on held-out data before and after, and the time of the steps."""

    before: float
    after: float
    seconds: float


def train(task: Task, strategy: Strategy | None, steps: int, rate: float, damping: float = 0.03) -> Outcome:
    """Train by SGD preconditioned with the strategy, or by AdamW if there is no strategy."""
    torch.manual_seed(0)
    model = task.model()
    before = held_out_loss(task, model)
    if strategy is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), rate)
        preconditioner = None
    else:
        optimizer = torch.optim.SGD(model.parameters(), rate)
        preconditioner = KFAC(model, strategy, damping=damping, sharing=task.sharing)
    start = perf_counter()
    for inputs, targets in islice(task.batches(), steps):
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        if strategy is not None and strategy.takes_second_pass:
            optimizer.zero_grad()
            task.loss(model(inputs), targets).backward()
            preconditioner.second_pass()
    return Outcome(before, held_out_loss(task, model), perf_counter() - start)


@torch.no_grad()
def held_out_loss(task: Task, model: nn.Module) -> float:
    """Return the loss on the held-out data, with the model in evaluation mode."""
    model.eval()
    loss = float(task.loss(model(task.held_out[0]), task.held_out[1]))
    model.train()
    return loss


def compare(title: str, task: Task, strategies: Iterable[tuple[str, Strategy | None, float]], steps: int) -> Table:
    """Train with each strategy in turn, and show losses and times."""
    table = Table("system", "loss before", f"after {steps} steps", "seconds", title=title, title_justify="left")
    for name, strategy, rate in track(list(strategies), description=title, console=Console(stderr=True)):
        with warnings.catch_warnings():
            # KFAC.report() tells which factors are too small for a system, and what they get instead.
            warnings.filterwarnings("ignore", message="KFAC: some factors")
            outcome = train(task, strategy, steps, rate)
        table.add_row(name, f"{outcome.before:.3f}", f"{outcome.after:.3f}", f"{outcome.seconds:.1f}")
    Console().print(table)
    return table
