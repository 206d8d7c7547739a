"""CG-FAC: conjugate gradients with the rows of the latest batches, and no factor at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.exact import Exact
from brandla.kfac.systems.kronecker import Kronecker
from brandla.kfac.systems.strategy import Curvature, StateCurvature, Strategy
from brandla.kfac.values import Gradient, Now, Rows, Shape, dense


@dataclass(frozen=True)
class ConjugateGradient(Strategy):
    """CG-FAC: ``iterations`` steps of conjugate gradients for (A ⊗ G + λI) x = ∂W, by products G X A with rows alone.

    O(k (d_G + d_A)) memory for the k rows kept, and 4k d_G d_A + 2k²(d_G + d_A) operations an iteration. λ is relative
    to the largest eigenvalue of A ⊗ G and is added to A ⊗ G as a whole. (Factors damped separately have a direct solve
    from k rows, with nothing to iterate for.) The number of iterations is fixed, so nothing is read back. At relative
    damping μ each takes the error down by about (1 − √μ)/(1 + √μ).

    Layers with one-hot inputs, and those with one factor, are left to `Exact`.

    Parameters
    ----------
    iterations
        Steps, each of one product with the curvature; the start takes one more.
    batches
        Room for the rows of this many batches of the largest size seen. A and G are the exponential averages of the
        latest rows in it.
    warm_start
        Start from the last step instead of zero. This takes d_G d_A more numbers.

    References
    ----------
    Y. Chen, "An iterative K-FAC algorithm for deep learning", arXiv 2101.00218.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, ConjugateGradient
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), ConjugateGradient())
    """

    iterations: int = 10
    batches: int = 1
    warm_start: bool = False

    def __post_init__(self) -> None:
        _check.count("ConjugateGradient", "iterations", self.iterations, 1)
        _check.count("ConjugateGradient", "batches", self.batches, 1)

    def curvature(self, shape: Shape) -> Curvature:
        if shape.one_hot or shape.single:
            return Kronecker.of(shape, Exact())
        return RowsOfBatches(shape, self)


class Side(NamedTuple):
    """Rows x of a factor M = Σ w x xᵀ / Σ w, the latest first: (*groups, k, n) and their weights w (k,)."""

    rows: Tensor
    weights: Tensor

    def taken(self, rows: Tensor, now: Now, most: int) -> Side:
        """Return the side with new rows in front, all others decayed and no more than ``most``, if finite."""
        share = (1 - now.decay) / max(rows.shape[-2], 1)
        weights = torch.cat([self.weights.new_full(rows.shape[-2:-1], share), now.decay * self.weights])
        joined = torch.cat([rows, self.rows], dim=-2)[..., :most, :]
        # Room for as many rows as the new side has: the choice is made on the device.
        missing = joined.shape[-2] - self.rows.shape[-2]
        kept = torch.nn.functional.pad(self.rows, (0, 0, 0, missing))
        kept_weights = torch.nn.functional.pad(self.weights, (0, missing))
        return Side(torch.where(now.finite, joined, kept), torch.where(now.finite, weights[:most], kept_weights))

    def root(self) -> Tensor:
        """Return R (*groups, k, n) with M = Rᵀ R."""
        total = self.weights.sum()
        return self.rows * (self.weights / torch.where(total > 0, total, 1)).sqrt()[:, None]


@dataclass
class RowsOfBatches(StateCurvature):
    """The rows of the latest batches of one layer, and its last step where that is a start for the next."""

    strategy: ConjugateGradient

    def absorb(self, rows: Rows, now: Now) -> None:
        """Keep the rows, a and g, the gradients of single terms of the loss."""
        count = rows.gradients.shape[-2]
        scaled = {"output": rows.gradients * (rows.uses * count) ** 0.5, "input": rows.inputs}
        for name, own in scaled.items():
            known = f"{name} rows" in self.state
            side = self._side(name) if known else Side(own[..., :0, :], own.new_zeros(0))
            most = max(self.strategy.batches * own.shape[-2], side.rows.shape[-2])
            self.state[f"{name} rows"], self.state[f"{name} weights"] = side.taken(own, now, most)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        matrix = dense(gradient)
        left, right = self._side("output").root(), self._side("input").root()
        shift = now.damping.of(_largest(left) * _largest(right))
        operator = _Operator(left, right, shift[..., None, None])
        start = self.state["last"] if "last" in self.state else torch.zeros_like(matrix)
        step = conjugate_gradient(operator, matrix, start, self.strategy.iterations)
        if self.strategy.warm_start:
            self.state["last"] = torch.where(now.finite, step, start)
        return step

    def sizes(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        groups, d_out, d_in = self.shape[:3]
        sides = {"output": d_out, "input": d_in}
        return {f"{name} rows": (*groups, len(state[f"{name} weights"]), n) for name, n in sides.items()}

    def _side(self, name: str) -> Side:
        return Side(self.state[f"{name} rows"], self.state[f"{name} weights"])


class _Operator(NamedTuple):
    """X ↦ G X A + λ X with G = RᵀR and A = QᵀQ."""

    left: Tensor
    right: Tensor
    shift: Tensor

    def __matmul__(self, matrix: Tensor) -> Tensor:
        inner = self.left @ matrix @ self.right.mT
        return self.left.mT @ inner @ self.right + self.shift * matrix


def _largest(root: Tensor) -> Tensor:
    """Estimate the largest eigenvalue of RᵀR from below by power iteration from its longest row, with no sync."""
    tiny = torch.finfo(root.dtype).tiny
    # The length of RᵀR v is a sum of fourth powers.
    scale = root.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    root = root / scale
    longest = torch.linalg.vector_norm(root, dim=-1).argmax(-1, keepdim=True)
    vector = torch.take_along_dim(root, longest[..., None], dim=-2).mT
    for _ in range(4):
        vector = vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True).clamp_min(tiny)
        vector = root.mT @ (root @ vector)
    norm: Tensor = torch.linalg.vector_norm(vector, dim=(-2, -1)) * scale[..., 0, 0].square()
    return norm


def conjugate_gradient(operator: _Operator, target: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Return the iterate of conjugate gradients for ``operator @ X = target``, each group by itself; no read-back."""
    # Of order 1, so that the squares of residuals are: those of their images are fourth powers more.
    scale = target.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    iterate = start / scale
    residual = target / scale - operator @ iterate
    direction, squared = residual, _squared(residual)
    for _ in range(iterations):
        image = operator @ direction
        length = _ratio(squared, (direction * image).sum((-2, -1), keepdim=True))
        iterate = iterate + length * direction
        residual = residual - length * image
        before, squared = squared, _squared(residual)
        direction = residual + _ratio(squared, before) * direction
    return iterate * scale


def _squared(part: Tensor) -> Tensor:
    return part.square().sum((-2, -1), keepdim=True)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """Return one / other; 0 where both are: at the solution the iteration stays there."""
    return torch.where(other > 0, one / torch.where(other > 0, other, 1), 0)
