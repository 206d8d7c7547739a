"""Two-level K-FAC: the coupling of layers, in a coarse space of one direction a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mode
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.samples import Samples
from brandla.kfac.systems.strategy import Curvature, Problem, Strategy, check_inner
from brandla.kfac.values import Gradient, Now, Rows, Shape, length, plus, scaled, sizes
from brandla.kfac.values import inner as product


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
        samples = _of_the_same_samples(problems)
        if not samples:
            return steps
        members = list(samples)
        first = [steps[index] for index in members]
        own = [problems[index] for index in members]
        seen = list(samples.values())
        vectors = self._vectors(own, first, seen, now)
        corrections = _coarse_solution(own, first, seen, vectors, now)
        for index, step, vector, correction in zip(members, first, vectors, corrections, strict=True):
            steps[index] = plus(step, correction, vector)
        return steps

    def _vectors(
        self, problems: Sequence[Problem], first: Sequence[Gradient], samples: Sequence[Samples], now: Now
    ) -> list[Gradient]:
        if self.space == "nicolaides":
            directions = [_ones(problem.gradient) for problem in problems]
        else:
            seen = _products(samples, first).sum(0)
            residuals = [
                problem._replace(gradient=plus(problem.gradient, -1.0, own.combined(seen, sizes(problem.gradient)[1])))
                for problem, own in zip(problems, samples, strict=True)
            ]
            directions = self.inner.steps(residuals, now)
        return [_unit(direction) for direction in directions]


def _of_the_same_samples(problems: Sequence[Problem]) -> dict[int, Samples]:
    """Return the samples of the problems that have rows, and as many samples as most."""
    found = {index: Samples.of(problem.rows) for index, problem in enumerate(problems) if problem.rows is not None}
    if not found:
        return {}
    usual = mode(own.number for own in found.values())
    return {index: own for index, own in found.items() if own.number == usual}


def _products(samples: Sequence[Samples], vectors: Sequence[Gradient]) -> Tensor:
    """Return the product of each sample's gradient with each layer's vector, shape (L, S)."""
    return torch.stack([own.products(vector) for own, vector in zip(samples, vectors, strict=True)])


def _coarse_solution(
    problems: Sequence[Problem],
    first: Sequence[Gradient],
    samples: Sequence[Samples],
    vectors: Sequence[Gradient],
    now: Now,
) -> Tensor:
    """(F_c + λI)⁻¹ R₀ (∇ − (F + λI) v₁), one number a layer."""
    coarse_rows = _products(samples, vectors)
    coarse = coarse_rows @ coarse_rows.mT
    shift, _ = now.damping.of_matrix(coarse)
    along = [
        torch.stack([product(part, vector) for part, vector in zip(parts, vectors, strict=True)])
        for parts in ([problem.gradient for problem in problems], first)
    ]
    right = along[0] - coarse_rows @ _products(samples, first).sum(0) - shift * along[1]
    coarse.diagonal().add_(shift)
    # Of a batch that is not finite nothing comes of the result; it must not raise, nor wait for the device.
    factor, _ = torch.linalg.cholesky_ex(coarse)
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


def _ones(gradient: Gradient) -> Gradient:
    if isinstance(gradient, Tensor):
        return torch.ones_like(gradient[..., :, :1]), torch.ones_like(gradient[..., :1, :]).mT
    return torch.ones_like(gradient[0][..., :1]), torch.ones_like(gradient[1][..., :1])


def _unit(vector: Gradient) -> Gradient:
    """Divide by the length; zero stays zero."""
    own = length(vector)
    return scaled(vector, 1 / torch.where(own > 0, own, 1))
