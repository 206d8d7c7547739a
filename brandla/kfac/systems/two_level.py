"""Two-level K-FAC: the coupling of layers, in a coarse space of one direction a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mode
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.samples import Samples
from brandla.kfac.systems.strategy import Curvature, Problem, Strategy, check_inner
from brandla.kfac.values import Gradient, Now, Rows, Shape, inner, length, plus, scaled, sizes


@dataclass(frozen=True)
class TwoLevel(Strategy):
    """v = v₁ + R₀ᵀ F_c⁻¹ R₀ (∇ − F v₁): any system's step v₁, corrected by the whole curvature.

    F = Σ v vᵀ over the samples of this step, the blocks between layers included; R₀ holds one unit vector a layer, and
    F_c = R₀ F R₀ᵀ. With λ both in F_c and in F v₁, v is the point of v₁ + range R₀ᵀ nearest to (F + λI)⁻¹∇ in the norm
    of F + λI. λ is relative to the largest eigenvalue of F_c. Only products with the rows of the step are formed.

    Parameters
    ----------
    inner
        The system of v₁.
    space
        ``"nicolaides"``: the vector of ones of each layer. ``"residual"``: the inner system's step for the layer's
        part of ∇ − F v₁.

    Notes
    -----
    Layers with no rows in a step, or with another number of samples than most, keep the inner step.

    Unlike v₁, v is not a positive definite matrix times ∇. It may go uphill in single layers and, after a clip of each
    layer by itself, also as a whole. The clip by KL takes ⟨v, ∇⟩ for the length of v, but ⟨v, ∇⟩ does not bound it.

    References
    ----------
    A. Koroko, A. Anciaux-Sedrakian, I. Ben Gharbia, V. Garès, M. Haddou, Q. H. Tran, "Analysis and comparison of
    two-level KFAC methods for training deep neural networks", arXiv 2303.18083: its authors find no real gain over
    K-FAC.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, TwoLevel, Brand
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), TwoLevel(Brand(rank=4)))
    """

    reads_rows: ClassVar[bool] = True

    inner: Strategy
    space: Literal["nicolaides", "residual"] = "nicolaides"

    def __post_init__(self) -> None:
        check_inner(self, self.inner, Strategy, "a strategy such as Brand(rank=128)")
        _check.choice("TwoLevel", "space", self.space, ("nicolaides", "residual"))

    def curvature(self, shape: Shape) -> Curvature:
        return self.inner.curvature(shape)

    def absorb(self, curvatures: Sequence[Curvature], rows: Sequence[Rows], now: Now) -> None:
        self.inner.absorb(curvatures, rows, now)

    def solve(self, problems: Sequence[Problem], now: Now) -> list[Any]:
        steps = self.inner.steps(problems, now)
        samples = {index: Samples.of(own.rows) for index, own in enumerate(problems) if own.rows is not None}
        if not samples:
            return steps
        usual = mode(own.number for own in samples.values())
        samples = {index: own for index, own in samples.items() if own.number == usual}
        own, first, seen = [problems[index] for index in samples], [steps[index] for index in samples], samples.values()
        gradients = [problem.gradient for problem in own]
        of_first = _products(seen, first).sum(0)
        if self.space == "nicolaides":
            pairs = [(part, part.mT) if isinstance(part, Tensor) else part for part in gradients]
            directions: list[Gradient] = [
                (torch.ones_like(left[..., :1]), torch.ones_like(right[..., :1])) for left, right in pairs
            ]
        else:
            residuals = [
                problem._replace(gradient=plus(part, -1.0, of_layer.combined(of_first, sizes(part)[1])))
                for problem, part, of_layer in zip(own, gradients, seen, strict=True)
            ]
            directions = self.inner.steps(residuals, now)
        vectors = [_unit(direction) for direction in directions]
        # F_c, and R₀ (∇ − (F + λI) v₁), one number a layer.
        products = _products(seen, vectors)
        coarse = products @ products.mT
        shift, _ = now.damping.of_matrix(coarse)
        of_gradients, of_steps = (
            torch.stack([inner(part, vector) for part, vector in zip(parts, vectors, strict=True)])
            for parts in (gradients, first)
        )
        right = of_gradients - products @ of_first - shift * of_steps
        coarse.diagonal().add_(shift)
        # Of a batch that is not finite nothing comes of the result; it must not raise, nor wait for the device.
        factor, _ = torch.linalg.cholesky_ex(coarse)
        corrections = torch.cholesky_solve(right[:, None], factor)[:, 0]
        for index, step, vector, correction in zip(samples, first, vectors, corrections, strict=True):
            steps[index] = plus(step, correction, vector)
        return steps


def _products(samples: Iterable[Samples], vectors: Sequence[Gradient]) -> Tensor:
    """Return the product of each sample's gradient with each layer's vector, shape (L, S)."""
    return torch.stack([own.products(vector) for own, vector in zip(samples, vectors, strict=True)])


def _unit(vector: Gradient) -> Gradient:
    """Divide by the length; zero stays zero."""
    own = length(vector)
    return scaled(vector, 1 / torch.where(own > 0, own, 1))
