"""Scikit-learn's digits and a small network for them, for the examples whose topic is something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def digits() -> tuple[Tensor, Tensor]:
    """Return all pixels (1797, 64) and labels, in a random order."""
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(classes)[order]


def network() -> nn.Sequential:
    """Return a network with one hidden layer, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, batch: int = 128) -> Iterator[float]:
    """Train on random batches, and yield the loss of each batch before its step."""
    inputs, labels = digits()
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(labels), (batch,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        yield loss.item()


def compare(optimizers: dict[str, MakeOptimizer], steps: int) -> None:
    """Train with each optimizer, and print the losses of the first batch and of the last five."""
    for name, make in optimizers.items():
        model = network()
        losses = list(train(model, make(model.parameters()), steps))
        print(f"{name}: {losses[0]:.3f} -> {sum(losses[-5:]) / 5:.3f}")
