"""Arithmetic of gradients: matrices, and pairs (P, Q) that stand for P Qᵀ."""

from __future__ import annotations

import torch
from torch import Tensor

from brandla.kfac.strategy import Gradient


def inner(one: Gradient, other: Gradient) -> Tensor:
    """Return the inner product; of products, ⟨P Qᵀ, R Sᵀ⟩ = ⟨PᵀR, QᵀS⟩ needs no d_out × d_in matrix."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return (dense(one) * dense(other)).sum()
    return ((one[0].mT @ other[0]) * (one[1].mT @ other[1])).sum()


def length(part: Gradient) -> Tensor:
    """Return ‖·‖_F; of a product P Qᵀ no less than √ε ‖P‖ ‖Q‖, below which ⟨PᵀP, QᵀQ⟩ is rounding, of either sign."""
    if isinstance(part, Tensor):
        norm: Tensor = torch.linalg.vector_norm(part)
        return norm
    first, second = (torch.linalg.vector_norm(factor) for factor in part)
    rounding = torch.finfo(first.dtype).eps ** 0.5 * first * second
    return torch.maximum(inner(part, part).clamp_min(0).sqrt(), rounding)


def dense(part: Gradient) -> Tensor:
    """Return the matrix."""
    return part if isinstance(part, Tensor) else part[0] @ part[1].mT


def plus(one: Gradient, factor: Tensor | float, other: Gradient) -> Gradient:
    """``one + factor · other``: of two pairs, the pair of both; else a matrix."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return dense(one) + factor * dense(other)
    return torch.cat([one[0], factor * other[0]], dim=-1), torch.cat([one[1], other[1]], dim=-1)


def scaled(part: Gradient, factor: Tensor | float) -> Gradient:
    """``factor · part``."""
    return part * factor if isinstance(part, Tensor) else (part[0] * factor, part[1])
