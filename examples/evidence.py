"""Weight decay and early stopping on digits, with no validation set: ``python -m examples.evidence``.

The evidence of a candidate takes one pass of K-FAC over the training data. Cross-validation trains five networks.
"""

from __future__ import annotations

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from brandla.kfac import KFAC, Exact, evidence
from examples.digits import digits, network

TRAINING, FOLDS = 300, 5
PRECISIONS = (0.1, 1.0, 10.0, 100.0)


def train(inputs: Tensor, labels: Tensor, precision: float, steps: int) -> nn.Module:
    """Train on all data in each step, with the weight decay of the log posterior, δ/N."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        squares = sum(weight.square().sum() for weight in model.parameters())
        (cross_entropy(model(inputs), labels) + 0.5 * precision / len(labels) * squares).backward()
        optimizer.step()
    return model


def evidence_of(model: nn.Module, inputs: Tensor, labels: Tensor, precision: float) -> float:
    """Return the log marginal likelihood per sample."""
    preconditioner = KFAC(model, Exact(inverse_every=1), curvature="type-2")
    outputs = model(inputs)
    preconditioner.curvature(outputs)
    loss = cross_entropy(outputs, labels)
    loss.backward()
    preconditioner.step()
    log_evidence = evidence(preconditioner, -len(labels) * loss.detach(), precision, terms=len(labels))
    preconditioner.remove()
    model.zero_grad()
    return log_evidence.item() / len(labels)


def cross_validated(inputs: Tensor, labels: Tensor, precision: float, steps: int) -> float:
    """Return the mean log-likelihood of each fifth of the data under a network trained on the other fifths."""
    folds = torch.arange(len(labels)) % FOLDS
    losses = []
    for fold in range(FOLDS):
        model = train(inputs[folds != fold], labels[folds != fold], precision, steps)
        losses.append(cross_entropy(model(inputs[folds == fold]), labels[folds == fold]).item())
    return -sum(losses) / FOLDS


def main(steps: int = 100) -> None:
    """Show the evidence and the cross-validation beside the log-likelihood of unseen data."""
    inputs, labels = digits()
    table = Table(
        "δ", "steps", "evidence", "cross-validation", "unseen data", title="per sample, the higher the better"
    )
    for precision in PRECISIONS:
        for taken in (steps // 4, steps):
            model = train(inputs[:TRAINING], labels[:TRAINING], precision, taken)
            marginal = evidence_of(model, inputs[:TRAINING], labels[:TRAINING], precision)
            validated = cross_validated(inputs[:TRAINING], labels[:TRAINING], precision, taken)
            unseen = -cross_entropy(model(inputs[TRAINING:]), labels[TRAINING:]).item()
            table.add_row(f"{precision:g}", str(taken), *(f"{value:.3f}" for value in (marginal, validated, unseen)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
