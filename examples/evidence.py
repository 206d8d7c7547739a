"""Weight decay and early stopping on digits, with no validation set: ``python -m examples.evidence``.

The evidence of each candidate comes from one pass of K-FAC over the training data; cross-validation trains five times.
"""

from __future__ import annotations

import torch
import typer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from brandla.kfac import KFAC, Exact, evidence

TRAINING, FOLDS, CHECKS = 300, 5, 4
PRECISIONS = (0.1, 1.0, 10.0, 100.0)


def digits() -> tuple[Tensor, Tensor]:
    """Return all pixels and labels, in a random order."""
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(classes)[order]


def trained(inputs: Tensor, labels: Tensor, precision: float, steps: int) -> nn.Module:
    """Train with the log posterior's decay, δ/N, by steps over all data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        squares = sum(weight.square().sum() for weight in model.parameters())
        (cross_entropy(model(inputs), labels) + 0.5 * precision / len(labels) * squares).backward()
        optimizer.step()
    return model


def evidence_of(model: nn.Module, inputs: Tensor, labels: Tensor, precision: float) -> float:
    """Return the log marginal likelihood a sample."""
    preconditioner = KFAC(model, Exact(inverse_every=1), curvature="type-2")
    outputs = model(inputs)
    preconditioner.curvature(outputs)
    loss = cross_entropy(outputs, labels)
    loss.backward()
    preconditioner.step()
    found = evidence(preconditioner, -len(labels) * loss.detach(), precision, terms=len(labels))
    preconditioner.remove()
    model.zero_grad()
    return found.item() / len(labels)


def cross_validated(inputs: Tensor, labels: Tensor, precision: float, steps: int) -> float:
    """Return the mean log-likelihood of each fifth under a network trained on the others."""
    folds = torch.arange(len(labels)) % FOLDS
    losses = []
    for fold in range(FOLDS):
        model = trained(inputs[folds != fold], labels[folds != fold], precision, steps)
        losses.append(cross_entropy(model(inputs[folds == fold]), labels[folds == fold]).item())
    return -sum(losses) / FOLDS


def main(steps: int = 200) -> None:
    """Show both beside the log-likelihood of data that neither has seen."""
    inputs, labels = digits()
    table = Table(
        "δ", "steps", "evidence", "cross-validation", "unseen data", title="per sample, the higher the better"
    )
    for precision in PRECISIONS:
        for taken in (steps // CHECKS, steps):
            model = trained(inputs[:TRAINING], labels[:TRAINING], precision, taken)
            known = evidence_of(model, inputs[:TRAINING], labels[:TRAINING], precision)
            validated = cross_validated(inputs[:TRAINING], labels[:TRAINING], precision, taken)
            unseen = -cross_entropy(model(inputs[TRAINING:]), labels[TRAINING:]).item()
            table.add_row(f"{precision:g}", str(taken), *(f"{value:.3f}" for value in (known, validated, unseen)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
