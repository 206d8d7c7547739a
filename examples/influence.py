"""Which training samples have wrong labels? Influence functions by EK-FAC: ``python -m examples.influence``.

The influence of sample i on the loss of sample j is −∇ℓ_jᵀ (F + λI)⁻¹ ∇ℓ_i (arXiv 2308.03296). A first pass over the
data streams the factors into low-rank bases (`Brand`). A second pass fits the curvature's values in them, as EK-FAC
does. No d × d matrix is formed. A sample of high influence on its own loss is memorised: its label may be wrong.
"""

from __future__ import annotations

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad

from brandla.kfac import KFAC, Brand, Exact
from examples.digits import digits, network

RANK, DAMPING, WRONG = 32, 0.1, 0.1


def gradients(model: nn.Sequential, inputs: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (g, a) of each Linear. Their outer products are the gradients of single samples."""
    hidden = model[1](model[0](inputs)).detach()
    errors = (model[2](hidden).softmax(-1) - one_hot(labels, 10)).detach()
    inner = errors @ model[2].weight.detach() * (1 - hidden.square())
    return [(inner, pad(inputs, (0, 1), value=1.0)), (errors, pad(hidden, (0, 1), value=1.0))]


def bases(model: nn.Sequential, inputs: Tensor, labels: Tensor, batch: int = 100) -> list[tuple[Tensor, Tensor]]:
    """Stream the data through K-FAC, without a step, and return the eigenvectors of G and A of each layer."""
    # The factor of the ten outputs is dense, because it is so small that a low rank saves nothing.
    preconditioner = KFAC(model, {"0": Brand(RANK, form="eigh"), "2": Exact(1)}, decay=0.9)
    for rows in torch.arange(len(labels)).split(batch):
        model.zero_grad()
        cross_entropy(model(inputs[rows]), labels[rows]).backward()
        preconditioner.step()
    layers = preconditioner.state_dict()["layers"].values()
    preconditioner.remove()
    sides = ("output", "input")
    return [tuple(layer["curvature"][side]["state"]["eigenvectors"] for side in sides) for layer in layers]


def self_influence(model: nn.Sequential, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return ∇ℓ_iᵀ (F + λI)⁻¹ ∇ℓ_i of every sample. F has fitted values in the bases, and is 0 outside of them."""
    total = torch.zeros(len(labels))
    layers = zip(gradients(model, inputs, labels), bases(model, inputs, labels), strict=True)
    for (outputs, rows), (left, right) in layers:
        squares = (outputs @ left).square(), (rows @ right).square()
        values = squares[0].mT @ squares[1] / len(labels)
        damping = DAMPING * values.max()
        inside = (squares[0] @ (1 / (values + damping)) * squares[1]).sum(1)
        outside = outputs.square().sum(1) * rows.square().sum(1) - squares[0].sum(1) * squares[1].sum(1)
        total += inside + outside / damping
    return total


def train(steps: int) -> tuple[list[float], float]:
    """Train with a tenth of the labels wrong. Return the losses, and the share of wrong ones among as many suspects."""
    inputs, labels = digits()
    wrong = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)) < WRONG
    labels = torch.where(wrong, (labels + 1) % 10, labels)
    model, losses = network(), []
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    suspects = self_influence(model, inputs, labels).topk(int(wrong.sum())).indices
    return losses, wrong[suspects].float().mean().item()


def main(steps: int = 60) -> None:
    """Show how many of the samples with the highest influence on themselves have wrong labels."""
    losses, share = train(steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {share:.0%} of the suspects are wrong, of all {WRONG:.0%}")


if __name__ == "__main__":
    typer.run(main)
