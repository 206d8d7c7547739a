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

# Gradients of samples with several positions are formed in chunks of this many entries, or of one sample.
_CHUNK_ENTRIES = 2**22


@dataclass(frozen=True)
class Eigenbasis(Exact):
    """`Exact` with all n eigenvectors, including those of directions without data."""

    # A young factor has many directions without data, whose eigenvectors are rounding.
    renews_early: ClassVar[bool] = False

    def __str__(self) -> str:
        """Return the name and options of `EKFAC`, which reports and saved states show."""
        return str(EKFAC(self.inverse_every))

    def decompose(self, average: Tensor) -> LowRankEigh:
        """Decompose M + ε M_max I, M_max the largest entry: equal to M up to rounding, and with no null direction."""
        largest = average.diagonal(dim1=-2, dim2=-1).amax(-1)
        shift = torch.where(largest > 0, torch.finfo(average.dtype).eps * largest, 1)[..., None]
        shifted = average.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
        values, vectors = super().decompose(shifted)
        return LowRankEigh((values - shift).clamp_min(0), vectors)


@dataclass(frozen=True)
class EKFAC(Strategy):
    """EK-FAC: step U_G [(U_Gᵀ ∂W U_A) / D] U_Aᵀ, with the second moments S of U_Gᵀ v U_A where K-FAC has d_G d_Aᵀ.

    v is the gradient of one sample in one call of the weight, summed over its positions. If calls, or the batches of
    several processes, have different numbers of positions, each position counts as a sample. Among all curvatures with
    these eigenvectors, the one with S is nearest to F in the Frobenius norm. D = S + λ_G 1 d_Aᵀ + λ_A d_G 1ᵀ + λ_G λ_A,
    so with S = d_G d_Aᵀ the step equals the step of `Exact` at the same damping. When the eigenvectors are renewed, S
    becomes (R_G ∘ R_G) S (R_A ∘ R_A)ᵀ with R = U⁺ᵀU.

    It stores d_G d_A more numbers than `Exact`, and a step with k columns of data takes 2k(d_G² + d_A² + d_G d_A) more
    operations. Layers with one-hot inputs, and layers with one factor, use `Exact`.

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
        """Take in the rows. For new eigenvectors, S becomes the diagonal of the old curvature in the new basis."""
        old = self._vectors()
        self.bases.absorb(rows, now)
        vectors = self._vectors()
        if any(vectors[side] is not old[side] for side in old):
            squares = {side: (vectors[side].mT @ old[side]).square() for side in old}
            self.sums = squares["output"] @ self.sums @ squares["input"].mT
        moments = _second_moments(Samples.of(rows), vectors["output"], vectors["input"])
        self.sums.mul_(now.decay).add_(moments, alpha=1 - now.decay)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Divide by the damped second moments in the eigenbasis."""
        input_, output = (factor for _, factor in self.bases.sides)
        (d_in, right), (d_out, left) = (
            (factor.state["eigenvalues"], factor.state["eigenvectors"]) for factor in (input_, output)
        )
        shift_out, shift_in = (now.damping.of(factor.largest()) for factor in (output, input_))
        divisor = self.sums / input_.state["total"]
        divisor = divisor + shift_out[..., None, None] * d_in[..., None, :]
        divisor += (shift_in[..., None] * (d_out + shift_out[..., None]))[..., :, None]
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
        return {side: factor.state["eigenvectors"] for side, factor in self.bases.sides if factor.state}


def _second_moments(samples: Samples, output: Tensor, input_: Tensor) -> Tensor:
    """Return N Σ (U_Gᵀ v U_A)² over the samples, squared entry by entry."""
    left, right = samples.gradients @ output, samples.inputs @ input_
    if samples.positions == 1:
        moments: Tensor = left.square().mT @ right.square()
        return samples.uses * moments
    left, right = (side.unflatten(-2, (-1, samples.positions)) for side in (left, right))
    total: Tensor = left.new_zeros(*left.shape[:-3], left.shape[-1], right.shape[-1])
    chunk = max(_CHUNK_ENTRIES // max(total.numel(), 1), 1)
    for left_chunk, right_chunk in zip(left.split(chunk, dim=-3), right.split(chunk, dim=-3), strict=True):
        total += (left_chunk.mT @ right_chunk).square().sum(-3)
    return samples.uses * total
