"""Small networks, steps of them, and the dense K-FAC formula in float64 that the preconditioner is held against."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from brandla.kfac import KFAC

Batch = tuple[Tensor, Tensor]


def mlp(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    """A ReLU network whose activations overwrite their input."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias, dtype=dtype), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Words(nn.Module):
    """Every kind of rows: indices with padding, whole gradients, channels in groups, positions."""

    def __init__(self, words: int, width: int, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, 6, 2, groups=2)
        self.out = nn.Linear(6, classes)
        self.double()

    def forward(self, indices: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(self.norm(self.words(indices)).mT)).mean(-1))


def batch(count: int, d_in: int, classes: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    """Normal inputs and random labels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, d_in, generator=generator, dtype=dtype)
    return inputs, torch.randint(classes, (count,), generator=generator)


def gradients(model: nn.Module) -> list[Tensor]:
    """Copies of all gradients."""
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def loss_of(model: nn.Module, data: Batch) -> Tensor:
    """Cross-entropy of a batch."""
    return nn.functional.cross_entropy(model(data[0]), data[1])


def stepped(model: nn.Module, preconditioner: KFAC, loss: Tensor) -> list[Tensor]:
    """One backward pass and one step; copies of all gradients after it."""
    model.zero_grad()
    loss.backward()
    preconditioner.step()
    return gradients(model)


def train(model: nn.Module, preconditioner: KFAC, data: Iterable[Batch], rate: float = 0.1) -> None:
    """A step of SGD for each batch."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for own in data:
        stepped(model, preconditioner, loss_of(model, own))
        optimizer.step()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    """All weights have the same bits."""
    assert all(map(torch.equal, one.parameters(), other.parameters()))


def layer_gradient(layer: nn.Module) -> Tensor:
    """A copy of the gradients of a layer's own parameters as one matrix: a row for each output, the bias last."""
    parts = (parameter.grad for parameter in layer.parameters(recurse=False))
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


class Step(NamedTuple):
    """A step of a Linear layer: its rows with the 1 of the bias, their gradients, and ∂W before and after."""

    inputs: Tensor
    outputs: Tensor
    gradient: Tensor
    result: Tensor

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A, and G of a loss that is a mean."""
        count = len(self.inputs)
        return self.inputs.T @ self.inputs / count, count * self.outputs.T @ self.outputs


def layer_step(layer: nn.Linear, preconditioner: KFAC, data: Batch) -> Step:
    """A step on the cross-entropy of what one layer makes of a batch."""
    layer.zero_grad()
    outputs = layer(data[0])
    outputs.retain_grad()
    nn.functional.cross_entropy(outputs, data[1]).backward()
    gradient = layer_gradient(layer)
    preconditioner.step()
    inputs = data[0] if layer.bias is None else with_one(data[0])
    return Step(inputs, outputs.grad, gradient, layer_gradient(layer))


def with_one(inputs: Tensor) -> Tensor:
    """Append the 1 of the bias to each row."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)


def damped_inverse(factor: Tensor, damping: float, largest: Tensor | None = None) -> Tensor:
    """(M + damping · λ_max I)⁻¹; λ_max may be given."""
    shift = damping * (torch.linalg.eigvalsh(factor)[-1] if largest is None else largest)
    return torch.linalg.inv(factor + shift * torch.eye(len(factor), dtype=factor.dtype))


def dense_step(inputs: Tensor, output_gradients: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """The K-FAC step of one batch by dense inverses: A = mean a aᵀ, G = mean of g gᵀ of a loss that is a mean."""
    count = len(inputs)
    A = inputs.T @ inputs / count
    G = output_gradients.T @ output_gradients * count
    return damped_inverse(G, damping) @ gradient @ damped_inverse(A, damping)
