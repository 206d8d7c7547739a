"""EK-FAC: the curvature's own diagonal in the eigenbasis of the Kronecker factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.exact import Exact
from brandla.kfac.systems.factor import Factor
from brandla.kfac.systems.form import State, restored
from brandla.kfac.systems.kronecker import Kronecker
from brandla.kfac.systems.samples import Samples
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.systems.strategy import Curvature, Strategy
from brandla.kfac.values import Gradient, Now, Rows, Shape, Side, dense
from brandla.lowrank import LowRankEigh

# Gradients of samples with several positions are formed so many numbers at a time, or one by one.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Eigenbasis(Exact):
    """`Exact` with all n eigenvectors, those of directions without data too."""

    # Rounding chooses the vectors of a young factor's many directions without data.
    renews_early: ClassVar[bool] = False

    def __str__(self) -> str:
        """Return the name and options of the strategy that was asked for, as reports and saved states have it."""
        return str(EKFAC(self.inverse_every))

    def decompose(self, average: Tensor) -> LowRankEigh:
        """Decompose M + ε M_max I, M_max the largest entry: the same to rounding, and no direction is empty."""
        largest = average.diagonal(dim1=-2, dim2=-1).amax(-1)
        shift = torch.where(largest > 0, torch.finfo(average.dtype).eps * largest, 1)[..., None]
        shifted = average.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        values, vectors = super().decompose(shifted)
        return LowRankEigh((values - shift).clamp_min(0), vectors)


@dataclass(frozen=True)
class EKFAC(Strategy):
    """EK-FAC: step U_G [(U_Gᵀ ∂W U_A) / D] U_Aᵀ, with the second moments S of U_Gᵀ v U_A where K-FAC has d_G d_Aᵀ.

    v is the gradient of one sample, summed over its positions. Of all curvatures with these eigenvectors, the one with
    S is nearest to F in the Frobenius norm. D = S + λ_G 1 d_Aᵀ + λ_A d_G 1ᵀ + λ_G λ_A, so with S = d_G d_Aᵀ the step
    equals the step of `Exact` at the same damping. A renewal of the eigenvectors carries S over to the new ones: S ←
    (R_G ∘ R_G) S (R_A ∘ R_A)ᵀ with R = U⁺ᵀU.

    It takes d_G d_A numbers more than `Exact`, and 2k(d_G² + d_A² + d_G d_A) more operations at a step with k columns
    of data. Layers with one-hot inputs, and those with one factor, are left to `Exact`.

    Parameters
    ----------
    inverse_every
        Steps between renewals of the eigenvectors: a number, or a function of the step.

    References
    ----------
    T. George, C. Laurent, X. Bouthillier, N. Ballas, P. Vincent, "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis", NeurIPS 2018, arXiv 1806.03884.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, EKFAC
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), EKFAC())
    """

    inverse_every: Schedule[int] = 10

    def __post_init__(self) -> None:
        _check.count("EKFAC", "inverse_every", at(self.inverse_every, 0), 1)

    def curvature(self, shape: Shape) -> Curvature:
        if shape.one_hot or shape.single:
            return Kronecker.of(shape, Exact(self.inverse_every))
        size = (*shape.groups, shape.d_out, shape.d_in)
        sums = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        return EigenvalueCorrected(Kronecker.of(shape, Eigenbasis(self.inverse_every)), sums)


@dataclass
class EigenvalueCorrected(Curvature):
    """Factors with their eigenvectors, and the exponential sum of second moments in that basis."""

    bases: Kronecker
    sums: Tensor

    @property
    def started(self) -> bool:
        return self.bases.started

    def absorb(self, rows: Rows, now: Now) -> None:
        """Take in the rows; S becomes the diagonal, in new eigenvectors, of the curvature that it stood for."""
        known = self._vectors()
        self.bases.absorb(rows, now)
        vectors = self._vectors()
        if any(vectors[side] is not known[side] for side in known):
            turned = {side: (vectors[side].mT @ known[side]).square() for side in known}
            self.sums = turned["output"] @ self.sums @ turned["input"].mT
        moments = _second_moments(Samples.of(rows), vectors["output"], vectors["input"])
        self.sums.mul_(now.decay).add_(moments, alpha=1 - now.decay)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Divide by the second moments and damping, in the eigenbasis."""
        input_, output = (own for _, own in self.bases.sides)
        (d_in, right), (d_out, left) = (
            (own.state["eigenvalues"], own.state["eigenvectors"]) for own in (input_, output)
        )
        by_output, by_input = (now.damping.of(own.largest()) for own in (output, input_))
        divisor = self.sums / input_.state["total"]
        divisor = divisor + by_output[..., None, None] * d_in[..., None, :]
        divisor += (by_input[..., None] * (d_out + by_output[..., None]))[..., :, None]
        rotated = left.mT @ dense(gradient) @ right
        return cast(Tensor, left @ (rotated / divisor) @ right.mT)

    def factors(self) -> Iterator[tuple[Side, Factor]]:
        return self.bases.factors()

    def parts(self) -> State:
        return {"bases": self.bases.parts(), "sums": self.sums}

    def loaded(self, state: dict[str, Any], where: str) -> EigenvalueCorrected:
        sums = restored(state["sums"], self.sums, f"{where}: sums")
        return replace(self, bases=self.bases.loaded(state["bases"], where), sums=sums)

    def _vectors(self) -> dict[Side, Tensor]:
        return {side: own.state["eigenvectors"] for side, own in self.bases.sides if own.state}


def _second_moments(samples: Samples, output: Tensor, input_: Tensor) -> Tensor:
    """N Σ (U_Gᵀ v U_A)² over the samples, squares entry by entry."""
    left, right = samples.gradients @ output, samples.inputs @ input_
    if samples.positions == 1:
        moments: Tensor = left.square().mT @ right.square()
        return samples.uses * moments
    left, right = (side.unflatten(-2, (-1, samples.positions)) for side in (left, right))
    total: Tensor = left.new_zeros(*left.shape[:-3], left.shape[-1], right.shape[-1])
    chunk = max(_AT_ONCE // max(total.numel(), 1), 1)
    for some, others in zip(left.split(chunk, dim=-3), right.split(chunk, dim=-3), strict=True):
        total += (some.mT @ others).square().sum(-3)
    return samples.uses * total
