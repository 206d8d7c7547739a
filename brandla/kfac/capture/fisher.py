"""The curvature of a loss in the outputs of a model, as vectors that are sent back through it.

With H the Hessian of one term of the loss in its outputs and J the derivative of the outputs by what a layer gives,
the layer's G is the mean of Jᵀ H J. So g = Jᵀ s for vectors s with Σ s sᵀ = H, or E s sᵀ = H for one that is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from brandla import _check

CurvatureType = Literal["empirical", "monte-carlo", "type-2"]
Loss = Literal["cross_entropy", "mse"]


def vectors(
    outputs: Tensor, loss: Loss, of: CurvatureType, weights: Tensor | None, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield s of all terms at once, each of the shape of ``outputs``: one that is drawn, or one for each class.

    The terms are along all dimensions but the classes'. Where ``"type-2"`` sends several back together, each has a
    random sign: products of different terms then vanish in expectation, and are 0 anyway where no term's gradient
    reaches another's inputs.
    """
    if not outputs.is_floating_point():
        _check.fail_type("KFAC.curvature", f"outputs must be real; got {_check.spelled(outputs.dtype)}")
    # Classes last; half precision has too few digits for probabilities.
    rows = by_term(outputs.detach(), loss)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    root = _checked(weights, rows).sqrt()[..., None]
    make = _of_cross_entropy if loss == "cross_entropy" else _of_squares
    for vector in make(rows, generator, drawn=of == "monte-carlo"):
        own = root * vector
        yield (own.reshape(outputs.shape) if outputs.ndim < 2 else own.movedim(-1, 1)).to(outputs.dtype)


def by_term(outputs: Tensor, loss: Loss) -> Tensor:
    """View (terms, classes, *positions) as (terms, *positions, classes); one dimension is classes, or terms of MSE."""
    if outputs.ndim < 2:
        return outputs.reshape(1, -1) if loss == "cross_entropy" else outputs.reshape(-1, 1)
    return outputs.movedim(1, -1)


def total(outputs: Tensor, loss: Loss, weights: Tensor | None) -> Tensor | float:
    """Return the sum of the weights of all terms, 1 each unless given."""
    rows = by_term(outputs.detach(), loss)
    return rows[..., 0].numel() if weights is None else _checked(weights, rows).sum()


def number(outputs: Tensor, loss: Loss, weights: Tensor | None) -> Tensor | float:
    """Return the number of terms of a mean: of weights w whose sum is 1 it is 1 / Σ w²."""
    if weights is None:
        return total(outputs, loss, None)
    own = _checked(weights, by_term(outputs.detach(), loss))
    return own.sum().square() / own.square().sum().clamp_min(torch.finfo(own.dtype).tiny)


def _checked(weights: Tensor | None, rows: Tensor) -> Tensor:
    if weights is None:
        return rows.new_ones(())
    if weights.shape != rows.shape[:-1]:
        shapes = f"one for each term, {tuple(rows.shape[:-1])}; got shape {tuple(weights.shape)}"
        _check.fail_value("KFAC.curvature", f"weights must be {shapes}")
    return weights.to(rows.dtype)


def _of_cross_entropy(logits: Tensor, generator: torch.Generator, *, drawn: bool) -> Iterator[Tensor]:
    """√p_c (e_c − p) for each class c, p = softmax(logits): Σ s sᵀ = diag(p) − p pᵀ.

    Or one column p − e_y, y ``drawn`` from p: E s sᵀ is the same.
    """
    p = logits.softmax(-1)
    if drawn:
        # As torch.multinomial draws one: with exponential variables E, P(argmax p / E = y) is p_y. No sync.
        labels = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
        yield p.scatter_add(-1, labels, -torch.ones_like(p))
        return
    for label in range(p.shape[-1]):
        root = _signed_ones(p, generator) * p[..., label : label + 1].sqrt()
        vector = -root * p
        vector[..., label] += root[..., 0]
        yield vector


def _of_squares(outputs: Tensor, generator: torch.Generator, *, drawn: bool) -> Iterator[Tensor]:
    """√(2/C) e_c for each component c: Σ s sᵀ = (2/C) I, the Hessian of the mean of C squares.

    Or √(2/C) ε with normal ε ``drawn``: E s sᵀ is the same.
    """
    scale = (2 / outputs.shape[-1]) ** 0.5
    if drawn:
        yield torch.empty_like(outputs).normal_(generator=generator) * scale
        return
    for component in range(outputs.shape[-1]):
        vector = torch.zeros_like(outputs)
        vector[..., component] = _signed_ones(outputs, generator)[..., 0] * scale
        yield vector


def _signed_ones(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return ±1 for each term."""
    ones = torch.empty(*rows.shape[:-1], 1, dtype=rows.dtype, device=rows.device)
    return ones.bernoulli_(0.5, generator=generator) * 2 - 1
