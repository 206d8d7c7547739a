"""CG-FAC: conjugate gradients with the rows of the latest batches, without any factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from brandla import _check
from brandla._small import largest_eigenvalue
from brandla.kfac.systems.exact import Exact
from brandla.kfac.systems.kronecker import Kronecker
from brandla.kfac.systems.strategy import Curvature, StateCurvature, Strategy
from brandla.kfac.values import Gradient, Now, Rows, Shape, dense


@dataclass(frozen=True)
class ConjugateGradient(Strategy):
    """CG-FAC: ``iterations`` steps of conjugate gradients for (A ⊗ G + λI) x = ∂W, by products G X A with rows alone.

    O(k (d_G + d_A)) memory for k kept rows, and 4k d_G d_A + 2k²(d_G + d_A) operations per iteration. λ is relative to
    the largest eigenvalue of A ⊗ G and is added to A ⊗ G as a whole. (Factors damped separately have a direct solve
    from k rows and need no iteration.) The number of iterations is fixed, so nothing is read back. At relative damping
    μ each iteration reduces the error by a factor of about (1 − √μ)/(1 + √μ).

    Layers with one-hot inputs, and layers with one factor, use `Exact`.

    Parameters
    ----------
    iterations
        Number of iterations, each with one product with the curvature; the start takes one more product.
    batches
        The number of latest rows that are kept, in batches of the largest size so far. A and G are the exponential
        averages over these rows.
    warm_start
        Start from the last step instead of zero. This stores d_G d_A more numbers.

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


@dataclass
class RowsOfBatches(StateCurvature):
    """The rows of the latest batches of one layer and, with ``warm_start``, its last step.

    A factor is M = Σ w x xᵀ / Σ w over its rows x (*groups, k, n), the latest first, with weights w (k,).
    """

    strategy: ConjugateGradient

    def absorb(self, rows: Rows, now: Now) -> None:
        """Put new rows in front of the kept ones, if finite: inputs a, and gradients g of single terms of the loss."""
        # A tied weight has more rows than uses. Curvature of type 2 has more gradients than inputs.
        inputs = rows.inputs * (rows.inputs.shape[-2] / rows.uses) ** 0.5
        gradients = rows.gradients * (rows.gradients.shape[-2] * rows.uses) ** 0.5
        scaled = {"output": gradients, "input": inputs}
        for side, new in scaled.items():
            old = self.state.get(f"{side} rows", new[..., :0, :])
            weights = self.state.get(f"{side} weights", new.new_empty(0))
            most = max(self.strategy.batches * new.shape[-2], old.shape[-2])
            share = (1 - now.decay) / max(new.shape[-2], 1)
            joined = torch.cat([new, old], dim=-2)[..., :most, :]
            joined_weights = torch.cat([weights.new_full(new.shape[-2:-1], share), now.decay * weights])[:most]
            # Old and new rows need one shape, because the device chooses between them.
            missing = joined.shape[-2] - old.shape[-2]
            self.state[f"{side} rows"] = torch.where(now.finite, joined, pad(old, (0, 0, 0, missing)))
            self.state[f"{side} weights"] = torch.where(now.finite, joined_weights, pad(weights, (0, missing)))

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return the last iterate of conjugate gradients, for each group separately and without a read-back."""
        matrix = dense(gradient)
        # R (*groups, k, n) with M = Rᵀ R.
        roots: list[Tensor] = []
        for side in ("output", "input"):
            weights = self.state[f"{side} weights"]
            roots.append(self.state[f"{side} rows"] * _ratio(weights, weights.sum()).sqrt()[:, None])
        left, right = roots
        largest = largest_eigenvalue(left @ left.mT) * largest_eigenvalue(right @ right.mT)
        shift = now.damping.of(largest)[..., None, None]

        def times(part: Tensor) -> Tensor:
            """Return G X A + λ X."""
            return left.mT @ (left @ part @ right.mT) @ right + shift * part

        start = self.state["last"] if "last" in self.state else torch.zeros_like(matrix)
        # With the gradient at order 1, squares of residuals stay in range: images add a fourth power of the data.
        scale = matrix.abs().amax((-2, -1), keepdim=True)
        scale = torch.where(scale > 0, scale, 1)
        iterate = start / scale
        residual = matrix / scale - times(iterate)
        direction, squared = residual, _inner(residual, residual)
        for _ in range(self.strategy.iterations):
            image = times(direction)
            length = _ratio(squared, _inner(direction, image))
            iterate = iterate + length * direction
            residual = residual - length * image
            before, squared = squared, _inner(residual, residual)
            direction = residual + _ratio(squared, before) * direction
        step = iterate * scale
        if self.strategy.warm_start:
            self.state["last"] = torch.where(now.finite, step, start)
        return step

    def sizes(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        groups, d_out, d_in = self.shape[:3]
        sides = {"output": d_out, "input": d_in}
        return {f"{name} rows": (*groups, len(state[f"{name} weights"]), n) for name, n in sides.items()}


def _inner(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((-2, -1), keepdim=True)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """Return one / other, or 0 unless other > 0, so that the iteration stays at the solution."""
    return torch.where(other > 0, one / torch.where(other > 0, other, 1), 0)
