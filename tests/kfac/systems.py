"""Per-sample gradients by autograd, one sample at a time: the definitions that systems are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from brandla.kfac import KFAC
from kfac.networks import layer_gradient


def sample_gradients(
    layers: Sequence[nn.Module], loss_of_sample: Callable[[int], Tensor], samples: int
) -> list[list[Tensor]]:
    """Gradients, by sample and layer, of each sample's own part of a mean loss, as matrices with the bias's column."""
    parts = []
    for index in range(samples):
        for layer in layers:
            layer.zero_grad()
        (loss_of_sample(index) / samples).backward()
        parts.append([layer_gradient(layer) for layer in layers])
    for layer in layers:
        layer.zero_grad()
    return parts


def fisher(parts: Sequence[Sequence[Tensor]], uses: int) -> Tensor:
    """N Σ v vᵀ, v the gradient of a sample over all layers, one behind the other."""
    rows = torch.stack([torch.cat([part.reshape(-1) for part in of_sample]) for of_sample in parts])
    return uses * rows.T @ rows


def flat(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices as one vector."""
    return torch.cat([matrix.reshape(-1) for matrix in matrices])


def step(model: nn.Module, preconditioner: KFAC, loss: Tensor) -> list[Tensor]:
    """Gradients of the Linear layers after a backward pass and a step."""
    model.zero_grad()
    loss.backward()
    preconditioner.step()
    return [layer_gradient(layer) for layer in linears(model)]


def linears(model: nn.Module) -> list[nn.Linear]:
    """Return the Linear layers."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def assert_near(result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare relative to the largest entry."""
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
