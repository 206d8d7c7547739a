"""Rank-aware orthonormalisation of tall panels by Cholesky QR with a float64 Gram matrix.

Orthonormal columns come out to working precision whatever the panel: columns that depend on earlier ones become zero
columns. Derivation and error bounds: ``docs/orthonormalisation.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from brandla._ranked import permuted, ranked_core, strongest_first
from brandla._sharded import WHOLE, Rows
from brandla_kernels import Tall, cholesky_inverse_core, gram, rounded_gram, tall

# Squared length that a unit column must keep through the second pass. One that loses more was rounding noise
# inside the span it was to be orthogonal to ("twice is enough").
SECOND_PASS = 0.25


def orthonormalize(panel: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and R with P = Q R, where Q has orthonormal columns, or zero ones where the rank of P runs out.

    Equivalent to ``torch.linalg.qr`` in exact arithmetic and full rank, with matrix products and Cholesky
    factorisations of order k only: 8nk² flops and no host sync.

    Parameters
    ----------
    panel
        P, shape (..., n, k), float32 or float64.

    Returns
    -------
    tuple
        Q, shape (..., n, k), and R, shape (..., k, k), in the dtype of P.
    """
    nearly, transform, triangle = factorize(panel)
    return nearly @ transform, triangle


def factorize(panel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return P′, T and R with Q = P′ T, so that a product Q W costs no more than P′ (T W); see `orthonormalize`."""
    panel_gram = gram(panel)
    length = panel_gram.diagonal(dim1=-2, dim2=-1).sqrt()
    first = first_pass(panel, panel_gram, length, panel.shape[-1], WHOLE)
    nearly = first.panel @ first.transform.to(panel.dtype)
    nearly_gram = rounded_gram(nearly)
    second, _ = cholesky_inverse_core(nearly_gram, unit_scale(nearly_gram), SECOND_PASS)
    triangle = second.mT @ nearly_gram @ first.triangle()
    return nearly, second.to(panel.dtype), triangle.to(panel.dtype)


def spanning(panel: Tensor) -> Tensor:
    """Return a matrix of the size of P whose columns span what those of P do, and are orthonormal to about √ε.

    One pass of `orthonormalize`, enough between two products. Columns that depend on earlier ones become zero.
    """
    panel_gram = gram(panel)
    first = first_pass(panel, panel_gram, panel_gram.diagonal(dim1=-2, dim2=-1).sqrt(), panel.shape[-1], WHOLE)
    spanned: Tensor = first.panel @ first.transform.to(panel.dtype)
    return spanned


class FirstPass(NamedTuple):
    """P = P′ B and P′ ≈ (P′ T) R, where the columns of P′ T are nearly orthonormal, or zero."""

    panel: Tall  # P′       [..., n, k]
    gram: Tensor  # P′ᵀP′       [..., k, k], float64
    transform: Tensor  # T      [..., k, k], float64
    to_panel: Tensor | None  # B; None stands for I

    def triangle(self) -> Tensor:
        """R B, so that P ≈ (P′ T) R B."""
        triangle = self.transform.mT @ self.gram
        return triangle if self.to_panel is None else triangle @ self.to_panel


def first_pass(panel: Tall, panel_gram: Tensor, length: Tensor, width: int, rows: Rows) -> FirstPass:
    """Orthonormalise a panel as far as its Gram matrix allows.

    A float64 Gram matrix resolves float64 columns only down to √ε of their length, so there a shifted Cholesky factor
    first brings the panel's condition down to 1/√ε (shifted Cholesky QR).
    """
    dtype = tall.dtype_of(panel)
    eps = torch.finfo(dtype).eps
    # A comparison with NaN is false.
    length = torch.where(length <= shortest(dtype), 0, length)
    if dtype != panel_gram.dtype:
        # Rounding of the projection leaves about √(r + k)·ε of a column that lies inside the span.
        transform = ranked_core(panel_gram, length, 64 * width * eps**2)
        return FirstPass(panel, panel_gram, transform, None)
    k = max(tall.columns(panel), 1)
    order = strongest_first(panel_gram, length, 64 * k * eps)
    if order is not None:
        panel, panel_gram = tall.each(tall.columns_at, panel, order), permuted(panel_gram, order)
        length = length.gather(-1, order)
    unit = torch.where(length > 0, length, 1)
    equilibrated = panel_gram / (unit[..., :, None] * unit[..., None, :])
    identity = torch.eye(panel_gram.shape[-1], dtype=dtype, device=panel_gram.device)
    to_panel = torch.linalg.cholesky_ex(equilibrated + 64 * k * eps * identity).L.mT * unit[..., None, :]
    panel = _solve_from_right(panel, to_panel)
    panel_gram = rows.total(gram(panel))
    transform = ranked_core(panel_gram, torch.ones_like(length), 16 * k * eps)
    if order is not None:
        to_panel = to_panel.take_along_dim(order.argsort(-1)[..., None, :], -1)
    return FirstPass(panel, panel_gram, transform, to_panel)


def shortest(dtype: torch.dtype) -> float:
    """Length up to which a column counts as zero: its inverse must be finite, and its square in float64 normal."""
    finfo, finest = torch.finfo(dtype), torch.finfo(torch.float64)
    return float(max(finfo.tiny / finfo.eps, (finest.tiny / finest.eps) ** 0.5))


def _solve_from_right(panel: Tall, triangle: Tensor) -> Tall:
    """Return P B⁻¹ for upper triangular B."""
    if isinstance(panel, Tensor):
        return torch.linalg.solve_triangular(triangle, panel, upper=True, left=False)
    return [_solve_from_right(part, own) for part, own in zip(panel, triangle, strict=True)]


def unit_scale(matrix: Tensor) -> Tensor:
    """Scale 1 for columns that hold something, 0 for the ones already cleared."""
    return (matrix.diagonal(dim1=-2, dim2=-1) > 0).to(matrix.dtype)
