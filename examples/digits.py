"""The task of the optimizers' examples: a network on scikit-learn's digits, beside AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BATCH, HELD_OUT, WIDTH = 64, 360, 128

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def train(make: Make, steps: int) -> float:
    """Train with the optimizer that ``make`` makes of the weights, and return the loss on digits not seen."""
    pixels, classes = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))
    optimizer = make(model.parameters())
    for _ in range(steps):
        batch = torch.randint(len(labels) - HELD_OUT, (BATCH,))
        optimizer.zero_grad()
        cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return cross_entropy(model(inputs[-HELD_OUT:]), labels[-HELD_OUT:]).item()


def compare(name: str, make: Make, steps: int) -> None:
    """Show the optimizer beside AdamW."""
    table = Table("optimizer", f"loss on digits not seen, after {steps} steps")
    for title, each in (("AdamW", lambda weights: torch.optim.AdamW(weights, 0.003)), (name, make)):
        table.add_row(title, f"{train(each, steps):.3f}")
    Console().print(table)


def is_matrix(weight: Tensor, rank: int) -> bool:
    """Say whether a basis of this rank saves anything on a weight."""
    return weight.ndim == 2 and min(weight.shape) > rank
