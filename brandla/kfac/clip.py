"""The clip of a step: by the RMS or the spectral norm of each weight's step, or by the divergence of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from brandla.kfac.capture.layer import StepPart
from brandla.kfac.values import Gradient, inner_product, map_by_kind, sizes
from brandla_kernels import signs

# Power iterations with SᵀS: from the last step's direction, and without one.
_WARM_ITERATIONS, _COLD_ITERATIONS = 5, 20


def rms_divisors(steps: Sequence[Sequence[Tensor]], clip: float) -> list[Tensor]:
    """Return max(1, RMS of the entries / clip) on the device for each weight's step, which is given in parts.

    The norm is taken over the entries, which are formed in any case. Gram matrices of a pair would be more work unless
    the pair is thin, and would give rounding errors alone if its terms cancel.
    """

    def divisors(members: list[Sequence[Tensor]]) -> Sequence[Tensor]:
        bounds = [clip * math.sqrt(sum([part.numel() for part in step])) for step in members]
        lengths = torch._foreach_norm([part for step in members for part in step])
        torch._foreach_div_(lengths, [bound for bound, step in zip(bounds, members, strict=True) for _ in step])
        of_parts = torch.stack(lengths).unflatten(0, (len(members), -1))
        relative: Tensor = torch.linalg.vector_norm(of_parts, dim=-1)
        return relative.clamp_min(1).unbind()

    return map_by_kind(steps, lambda step: (len(step), step[0].dtype, step[0].device), divisors)


def kl_divisor(steps: Sequence[Gradient], gradients: Sequence[Gradient], clip: float) -> Tensor:
    """Return max(1, √(Σ ⟨step, ∂W⟩ / clip)), one number for all layers.

    The inner product is the step's squared length in the curvature's metric: twice the divergence that it predicts.
    """
    squared = torch.stack([inner_product(*pair) for pair in zip(steps, gradients, strict=True)]).sum()
    return (squared.abs() / clip).sqrt().clamp_min(1)


class SpectralNorm(NamedTuple):
    """The spectral norm (*groups,) of each matrix S of a step, and unit vectors v (*groups, d_in) with ‖S v‖ ≈ ‖S‖."""

    norm: Tensor
    direction: Tensor


def spectral_norms(steps: Sequence[Gradient], directions: Sequence[Tensor | None], seed: int) -> list[SpectralNorm]:
    """Estimate spectral norms from below with no sync, from the last steps' directions and from random signs.

    The larger estimate counts, because the last direction may be orthogonal to the new step's.
    """
    widths = [sizes(step)[1] for step in steps]
    drawn: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    norms = []
    for step, width, old in zip(steps, widths, directions, strict=True):
        like = step if isinstance(step, Tensor) else step[0]
        if (like.dtype, like.device) not in drawn:
            number = torch.full((), seed, dtype=torch.int64, device=like.device)
            drawn[like.dtype, like.device] = signs(number, max(widths), 1, dtype=like.dtype)
        fresh = drawn[like.dtype, like.device][:width].expand(*like.shape[:-2], width, 1) / math.sqrt(width)
        fits = old is not None and (old.shape, old.dtype, old.device) == (fresh.shape[:-1], like.dtype, like.device)
        norms.append(_power_iteration(step, fresh, old[..., None] if old is not None and fits else None))
    return norms


def _power_iteration(step: Gradient, fresh: Tensor, old: Tensor | None) -> SpectralNorm:
    """Iterate from both starts and keep the larger norm. If it is 0 or not finite, the direction stays as it was."""
    tiny = torch.finfo(fresh.dtype).tiny
    vectors = fresh if old is None else torch.cat([old, fresh], dim=-1)
    for _ in range(_COLD_ITERATIONS if old is None else _WARM_ITERATIONS):
        image = _times(step, vectors)
        norms = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
        back = _times(step.mT if isinstance(step, Tensor) else step[::-1], image / norms.clamp_min(tiny))
        vectors = back / torch.linalg.vector_norm(back, dim=-2, keepdim=True).clamp_min(tiny)
    best = norms.argmax(-1, keepdim=True)
    norm = norms.take_along_dim(best, -1)
    before = fresh if old is None else old
    direction = torch.where((norm > 0) & norm.isfinite(), vectors.take_along_dim(best, -1), before)
    return SpectralNorm(norm[..., 0, 0], direction.squeeze(-1))


def _times(step: Gradient, vectors: Tensor) -> Tensor:
    product: Tensor = step @ vectors if isinstance(step, Tensor) else step[0] @ (step[1].mT @ vectors)
    return product


def copy_exact(steps: Sequence[Sequence[StepPart]]) -> None:
    """Copy, in one call, the steps that have their gradient's dtype. The others must be scaled before rounding."""
    parts = [part for step in steps for part in step if part.step is not part.gradient]
    same_dtype = [part for part in parts if part.step.dtype == part.gradient.dtype]
    if same_dtype:
        torch._foreach_copy_([part.gradient for part in same_dtype], [part.step for part in same_dtype])
    for part in same_dtype:
        part.step = part.gradient


def divide_and_copy(steps: Sequence[Sequence[StepPart]], divisors: Sequence[Tensor] | None) -> None:
    """Divide the steps, and copy those that `copy_exact` left, for gradients of less precision."""
    parts = [part for step in steps for part in step]
    if divisors is not None and parts:
        of_parts = [divisor for step, divisor in zip(steps, divisors, strict=True) for _ in step]
        torch._foreach_div_([part.step for part in parts], of_parts)
    for part in parts:
        if part.step is not part.gradient:
            part.gradient.copy_(part.step)
