"""How long a step may be: by the RMS of each layer's entries, or by the change of the model's output it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from brandla.kfac.capture.layer import Written
from brandla.kfac.values import Gradient, alike, inner


def by_rms(steps: Sequence[Sequence[Tensor]], clip: float) -> list[Tensor]:
    """Return min(1, clip / RMS of its entries) for the step of each layer, given in parts; on the device.

    Summed over the entries, which are written in any case: the Gram matrices of a pair are more work unless it is thin,
    and where its terms cancel they are rounding only.
    """

    def of(members: list[Sequence[Tensor]]) -> Sequence[Tensor]:
        bounds = [clip * math.sqrt(sum(part.numel() for part in step)) for step in members]
        lengths = torch._foreach_norm([part for step in members for part in step])
        torch._foreach_div_(lengths, [bound for bound, step in zip(bounds, members, strict=True) for _ in step])
        of_parts = torch.stack(lengths).unflatten(0, (len(members), -1))
        relative: Tensor = torch.linalg.vector_norm(of_parts, dim=-1)
        return relative.clamp_min(1).reciprocal().unbind()

    return alike(steps, lambda step: (len(step), step[0].dtype, step[0].device), of)


def by_kl(steps: Sequence[Gradient], gradients: Sequence[Gradient], clip: float) -> Tensor:
    """Return min(1, √(clip / Σ ⟨step, ∂W⟩)), one number for all layers.

    The inner product is the step's squared length in the curvature's metric, twice the divergence that it stands for.
    """
    squared = torch.stack([inner(step, gradient) for step, gradient in zip(steps, gradients, strict=True)]).sum()
    return (clip / squared.abs()).sqrt().clamp(max=1.0)


def finish(steps: Sequence[Sequence[Written]], factors: Sequence[Tensor] | None) -> None:
    """Scale the steps that were written, and write those of less precision, scaled."""
    parts = [part for step in steps for part in step]
    scales = None if factors is None else [own for step, own in zip(steps, factors, strict=True) for _ in step]
    inside = [index for index, part in enumerate(parts) if part.step is part.gradient]
    if scales is not None and inside:
        torch._foreach_mul_([parts[index].step for index in inside], [scales[index] for index in inside])
    for index, (step, gradient) in enumerate(parts):
        if step is not gradient:
            gradient.copy_(step if scales is None else step * scales[index])
