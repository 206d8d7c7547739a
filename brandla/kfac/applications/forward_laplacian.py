"""Value, first derivatives and Laplacian of a network with respect to its inputs, in one forward pass."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from brandla import _check

_ELEMENTWISE = (nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.Mish)
# The input of each Linear in a pass, with the bias's 1 or 0 (N, S, d_in), and its output (N, S, d_out).
Uses: TypeAlias = list[tuple[Tensor, Tensor]]


class Columns(NamedTuple):
    """u (N, m), its derivatives ∂u (N, m, d) in the coordinates, and Δu = Σ w ∂²u (N, m)."""

    value: Tensor
    gradient: Tensor
    laplacian: Tensor


def forward_laplacian(model: nn.Sequential, points: Tensor, weights: Tensor | None = None) -> Columns:
    """Return a network's value, first derivatives and Laplacian at points, with d + 2 columns for each point.

    The Laplacian is autograd's Hessian trace, in one pass instead of d. All is differentiable in the network's weights.

    Parameters
    ----------
    model
        ``nn.Sequential`` of ``nn.Linear`` and elementwise activations with two derivatives: Tanh, Sigmoid, SiLU, GELU,
        Softplus, Mish.
    points
        (N, d).
    weights
        w (d,): Δu = Σ w_i ∂²u/∂x_i²; ones by default. Use (0, 1, 1) if the first coordinate is time.

    Raises
    ------
    TypeError
        For other modules.

    References
    ----------
    R. Li, H. Ye, D. Jiang and others, "A computational framework for neural network-based variational Monte Carlo with
    forward Laplacian", Nature Machine Intelligence 2024, arXiv 2307.08214.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import forward_laplacian
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> [tuple(part.shape) for part in forward_laplacian(model, torch.randn(5, 2))]
    [(5, 1), (5, 1, 2), (5, 1)]
    """
    check_model("forward_laplacian", model)
    return split_columns(propagate(model, first_columns(points), weights, []))


def check_model(function: str, model: nn.Module) -> None:
    """Check that all modules of a model are supported."""
    wanted = f"nn.Sequential of nn.Linear and {', '.join(kind.__name__ for kind in _ELEMENTWISE)}"
    if not isinstance(model, nn.Sequential):
        _check.fail_type(function, f"model must be {wanted}; got {type(model).__name__}")
    for module in model:
        if not isinstance(module, (nn.Linear, *_ELEMENTWISE)):
            _check.fail_type(function, f"model must be {wanted}; it has {type(module).__name__}")


def first_columns(points: Tensor) -> Tensor:
    """Return x, its derivatives I and its Laplacian 0, as columns (N, d + 2, d)."""
    count, d = points.shape
    identity = torch.eye(d, dtype=points.dtype, device=points.device).expand(count, d, d)
    return torch.cat([points[:, None], identity, torch.zeros_like(points[:, None])], dim=1)


def propagate(model: nn.Sequential, columns: Tensor, weights: Tensor | None, uses: Uses) -> Tensor:
    """Send columns (N, S, ·) through a network: value, derivatives and Laplacian, or only values if S = 1."""
    for module in model:
        if not isinstance(module, nn.Linear):
            columns = module(columns) if columns.shape[1] == 1 else _activated(module, columns, weights)
            continue
        inputs = columns
        columns = columns @ module.weight.mT
        if module.bias is not None:
            # Derivatives have no bias.
            ones = torch.zeros_like(inputs[..., :1]).index_fill(1, torch.tensor([0], device=inputs.device), 1)
            inputs, columns = torch.cat([inputs, ones], dim=-1), columns + ones * module.bias
        uses.append((inputs.detach(), columns))
    return columns


def split_columns(columns: Tensor) -> Columns:
    """Split columns (N, S, m) into value, derivatives and Laplacian."""
    return Columns(columns[:, 0], columns[:, 1:-1].mT, columns[:, -1])


def _activated(module: nn.Module, columns: Tensor, weights: Tensor | None) -> Tensor:
    """Return σ(z), σ' ∂z, and σ' Δz + σ'' Σ w (∂z)²."""
    value, derivatives, laplacian = columns[:, :1], columns[:, 1:-1], columns[:, -1:]
    with torch.enable_grad():
        value = value if value.requires_grad else value.detach().requires_grad_()
        activated = module(value)
        # Each entry of σ depends on one entry of z, so the gradient of the sum is σ'.
        (slope,) = torch.autograd.grad(activated.sum(), value, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), value, create_graph=True)
    squares = derivatives.square() if weights is None else derivatives.square() * weights[:, None]
    laplacian = slope * laplacian + bend * squares.sum(1, keepdim=True)
    return torch.cat([activated, slope * derivatives, laplacian], dim=1)
