"""How long a step may be: by the RMS or the spectral norm of each weight's, or by the divergence that it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from brandla.kfac.capture.layer import StepPart
from brandla.kfac.values import Gradient, alike, inner, sizes
from brandla_kernels import signs

# Products with S and with Sᵀ from the direction of the last step, and from none.
_AGAIN, _AT_FIRST = 5, 20


def by_rms(steps: Sequence[Sequence[Tensor]], clip: float) -> list[Tensor]:
    """Return max(1, RMS of its entries / clip) for the step of each weight, given in parts; on the device.

    Summed over the entries, which are written in any case: the Gram matrices of a pair are more work unless it is thin,
    and where its terms cancel they are rounding only.
    """

    def of(members: list[Sequence[Tensor]]) -> Sequence[Tensor]:
        bounds = [clip * math.sqrt(sum([part.numel() for part in step])) for step in members]
        lengths = torch._foreach_norm([part for step in members for part in step])
        torch._foreach_div_(lengths, [bound for bound, step in zip(bounds, members, strict=True) for _ in step])
        of_parts = torch.stack(lengths).unflatten(0, (len(members), -1))
        relative: Tensor = torch.linalg.vector_norm(of_parts, dim=-1)
        return relative.clamp_min(1).unbind()

    return alike(steps, lambda step: (len(step), step[0].dtype, step[0].device), of)


def by_kl(steps: Sequence[Gradient], gradients: Sequence[Gradient], clip: float) -> Tensor:
    """Return max(1, √(Σ ⟨step, ∂W⟩ / clip)), one number for all layers.

    The inner product is the step's squared length in the curvature's metric, twice the divergence that it stands for.
    """
    squared = torch.stack([inner(step, gradient) for step, gradient in zip(steps, gradients, strict=True)]).sum()
    return (squared.abs() / clip).sqrt().clamp_min(1)


class Spectral(NamedTuple):
    """The spectral norm (*groups,) of each matrix S of a step, and the unit vectors (*groups, d_in) it comes from."""

    norm: Tensor
    direction: Tensor


def spectral(steps: Sequence[Gradient], known: Sequence[Tensor | None], seed: int) -> list[Spectral]:
    """Estimate spectral norms from below, with no sync: from the directions of the last steps, and from random signs.

    The better of the two is kept: the old direction may have no part in what a step has come to be.
    """
    widths = [sizes(step)[1] for step in steps]
    drawn: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    found = []
    for step, width, old in zip(steps, widths, known, strict=True):
        like = step if isinstance(step, Tensor) else step[0]
        if (like.dtype, like.device) not in drawn:
            number = torch.full((), seed, dtype=torch.int64, device=like.device)
            drawn[like.dtype, like.device] = signs(number, max(widths), 1, dtype=like.dtype)
        fresh = drawn[like.dtype, like.device][:width].expand(*like.shape[:-2], width, 1) / math.sqrt(width)
        fits = old is not None and (old.shape, old.dtype, old.device) == (fresh.shape[:-1], like.dtype, like.device)
        found.append(_iterated(step, fresh, old[..., None] if old is not None and fits else None))
    return found


def _iterated(step: Gradient, fresh: Tensor, old: Tensor | None) -> Spectral:
    """Go on by power iterations; a direction that is not finite, or that the step makes 0, is not kept."""
    tiny = torch.finfo(fresh.dtype).tiny
    vectors = fresh if old is None else torch.cat([old, fresh], dim=-1)
    for _ in range(_AT_FIRST if old is None else _AGAIN):
        image = _times(step, vectors)
        norms = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
        back = _times(step.mT if isinstance(step, Tensor) else step[::-1], image / norms.clamp_min(tiny))
        vectors = back / torch.linalg.vector_norm(back, dim=-2, keepdim=True).clamp_min(tiny)
    best = norms.argmax(-1, keepdim=True)
    norm = norms.take_along_dim(best, -1)
    direction = torch.where(
        (norm > 0) & norm.isfinite(), vectors.take_along_dim(best, -1), fresh if old is None else old
    )
    return Spectral(norm[..., 0, 0], direction.squeeze(-1))


def _times(step: Gradient, vectors: Tensor) -> Tensor:
    product: Tensor = step @ vectors if isinstance(step, Tensor) else step[0] @ (step[1].mT @ vectors)
    return product


def place(steps: Sequence[Sequence[StepPart]]) -> None:
    """Copy into the gradients, in one call, what would not be rounded there before it is scaled."""
    parts = [part for step in steps for part in step if part.step is not part.gradient]
    waiting = [part for part in parts if part.step.dtype == part.gradient.dtype]
    if waiting:
        torch._foreach_copy_([part.gradient for part in waiting], [part.step for part in waiting])
    for part in waiting:
        part.step = part.gradient


def finish(steps: Sequence[Sequence[StepPart]], divisors: Sequence[Tensor] | None) -> None:
    """Divide the steps, and write those that were not placed, for gradients of less precision."""
    parts = [part for step in steps for part in step]
    if divisors is not None and parts:
        each = [own for step, own in zip(steps, divisors, strict=True) for _ in step]
        torch._foreach_div_([part.step for part in parts], each)
    for part in parts:
        if part.step is not part.gradient:
            part.gradient.copy_(part.step)
