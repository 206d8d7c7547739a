"""Two-level K-FAC: the coupling of layers, in a coarse space of one direction per layer."""

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
from brandla.kfac.values import Gradient, Now, Rows, Shape, add_scaled, frobenius_norm, inner_product, scaled, sizes


@dataclass(frozen=True)
class TwoLevel(Strategy):
    """v = v₁ + R₀ᵀ F_c⁻¹ R₀ (∇ − F v₁): any system's step v₁, corrected by the whole curvature.

    F = Σ v vᵀ over the samples of this step, including the blocks between layers. R₀ has one unit vector per layer, and
    F_c = R₀ F R₀ᵀ. With λ both in F_c and in F v₁, v is the point of v₁ + range R₀ᵀ nearest to (F + λI)⁻¹∇ in the norm
    of F + λI. λ is relative to the largest eigenvalue of F_c. Only products with the rows of the step are formed.

    Parameters
    ----------
    inner
        The system of v₁.
    space
        The direction of each layer. ``"nicolaides"``: the vector of ones. ``"residual"``: the inner system's step for
        the layer's part of ∇ − F v₁.

    Notes
    -----
    Layers without rows in a step, or with another number of samples than most layers, keep the inner step.

    Unlike v₁, v is not a positive definite matrix times ∇. It may go uphill in single layers and, after a clip of each
    layer by itself, also as a whole. The clip by KL measures the length of v as ⟨v, ∇⟩, which does not bound it.

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
        of_layers = {index: Samples.of(own.rows) for index, own in enumerate(problems) if own.rows is not None}
        if not of_layers:
            return steps
        usual = mode(samples.number for samples in of_layers.values())
        of_layers = {index: samples for index, samples in of_layers.items() if samples.number == usual}
        members, first = [problems[index] for index in of_layers], [steps[index] for index in of_layers]
        gradients = [problem.gradient for problem in members]
        of_first = _sample_products(of_layers.values(), first).sum(0)
        if self.space == "nicolaides":
            pairs = [(part, part.mT) if isinstance(part, Tensor) else part for part in gradients]
            directions: list[Gradient] = [
                (torch.ones_like(left[..., :1]), torch.ones_like(right[..., :1])) for left, right in pairs
            ]
        else:
            residuals = [
                problem._replace(gradient=add_scaled(part, -1.0, samples.combined(of_first, sizes(part)[1])))
                for problem, part, samples in zip(members, gradients, of_layers.values(), strict=True)
            ]
            directions = self.inner.steps(residuals, now)
        vectors = [_unit(direction) for direction in directions]
        # F_c, and R₀ (∇ − (F + λI) v₁), one number per layer.
        products = _sample_products(of_layers.values(), vectors)
        coarse = products @ products.mT
        shift, _ = now.damping.of_matrix(coarse)
        of_gradients, of_steps = (
            torch.stack([inner_product(part, vector) for part, vector in zip(parts, vectors, strict=True)])
            for parts in (gradients, first)
        )
        right = of_gradients - products @ of_first - shift * of_steps
        coarse.diagonal().add_(shift)
        # The factorisation of a non-finite batch, whose result is not used, must not raise or wait for the device.
        factor, _ = torch.linalg.cholesky_ex(coarse)
        corrections = torch.cholesky_solve(right[:, None], factor)[:, 0]
        for index, step, vector, correction in zip(of_layers, first, vectors, corrections, strict=True):
            steps[index] = add_scaled(step, correction, vector)
        return steps


def _sample_products(of_layers: Iterable[Samples], vectors: Sequence[Gradient]) -> Tensor:
    """Return the product of each sample's gradient with each layer's vector, shape (L, S)."""
    return torch.stack([samples.products(vector) for samples, vector in zip(of_layers, vectors, strict=True)])


def _unit(vector: Gradient) -> Gradient:
    """Return a vector divided by its norm; zero stays zero."""
    norm = frobenius_norm(vector)
    return scaled(vector, 1 / torch.where(norm > 0, norm, 1))
