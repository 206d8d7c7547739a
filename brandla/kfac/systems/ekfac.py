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
from brandla.kfac.systems.form import stored
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

    # Rounding chooses the vectors of directions without data, which young factors have most.
    early: ClassVar[bool] = False

    def __str__(self) -> str:
        """Return the name and options of the strategy that was asked for, as reports and saved states have it."""
        return str(EKFAC(self.inverse_every))

    def decompose(self, average: Tensor) -> LowRankEigh:
        """Decompose M + ε M_max I, M_max the largest entry: the same to rounding, and no direction is empty."""
        largest = average.diagonal(dim1=-2, dim2=-1).amax(-1)
        shift = torch.where(largest > 0, torch.finfo(average.dtype).eps * largest, 1)
        shifted = average.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
        values, vectors = super().decompose(shifted)
        return LowRankEigh((values - shift[..., None]).clamp_min(0), vectors)


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
        known = self._eigenvectors() if self.started else None
        self.bases.absorb(rows, now)
        output, input_ = self._eigenvectors()
        if known is not None:
            self._carry(known, (output, input_))
        self.sums.mul_(now.decay).add_(_second_moments(Samples.of(rows), output, input_), alpha=1 - now.decay)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Divide by the second moments and damping, in the eigenbasis."""
        output, input_ = self._sides()
        (d_out, left), (d_in, right) = stored(output.state), stored(input_.state)
        by_output, by_input = output.shift(now.damping), input_.shift(now.damping)
        divisor = self.sums / input_.state["total"]
        divisor = divisor + by_output[..., None, None] * d_in[..., None, :]
        divisor += (by_input[..., None] * (d_out + by_output[..., None]))[..., :, None]
        rotated = left.mT @ dense(gradient) @ right
        solved: Tensor = left @ (rotated / divisor) @ right.mT
        return solved

    def factors(self) -> Iterator[tuple[Side, Factor]]:
        return self.bases.factors()

    def state_dict(self) -> dict[str, Any]:
        return {"bases": self.bases.state_dict(), "sums": self.sums.clone()}

    def loaded(self, state: dict[str, Any], where: str) -> EigenvalueCorrected:
        wanted, got = tuple(self.sums.shape), tuple(state["sums"].shape)
        if got != wanted:
            _check.fail_value("KFAC.load_state_dict", f"{where}: sums must have shape {wanted}; got {got}")
        sums = state["sums"].to(device=self.sums.device, dtype=self.sums.dtype, copy=True)
        return replace(self, bases=self.bases.loaded(state["bases"], where), sums=sums)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.bases.tensors()
        yield self.sums

    def _sides(self) -> tuple[Factor, Factor]:
        return cast(Factor, self.bases.output), cast(Factor, self.bases.input)

    def _eigenvectors(self) -> tuple[Tensor, Tensor]:
        output, input_ = self._sides()
        return stored(output.state).eigenvectors, stored(input_.state).eigenvectors

    def _carry(self, known: tuple[Tensor, Tensor], renewed: tuple[Tensor, Tensor]) -> None:
        """Replace S by the diagonal, in new eigenvectors, of the curvature that it stood for."""
        if all(old is new for old, new in zip(known, renewed, strict=True)):
            return
        left, right = ((new.mT @ old).square() for old, new in zip(known, renewed, strict=True))
        self.sums = left @ self.sums @ right.mT


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
