"""How long a step may be: by the RMS of each layer's entries, or by the change of the model's output it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from brandla.kfac.gradient import inner, length
from brandla.kfac.strategy import Gradient


def clipping(
    steps: Sequence[Gradient], gradients: Sequence[Gradient], clip: float | None, by: Literal["rms", "kl"]
) -> list[Tensor | float]:
    """Return what each layer's step is multiplied by, on the device.

    ``"rms"``: min(1, clip / RMS of the layer's step). ``"kl"``: min(1, √(clip / Σ ⟨step, ∂W⟩)), one for all layers: the
    inner product is the step's squared length in the curvature's metric, twice the divergence that it stands for.
    """
    if clip is None or not steps:
        return [1.0] * len(steps)
    if by == "rms":
        return [(clip * math.sqrt(_entries(step)) / length(step)).clamp(max=1.0) for step in steps]
    squared = torch.stack([inner(step, gradient) for step, gradient in zip(steps, gradients, strict=True)]).sum()
    return [(clip / squared.abs()).sqrt().clamp(max=1.0)] * len(steps)


def _entries(step: Gradient) -> int:
    return step.numel() if isinstance(step, Tensor) else step[0][..., 0].numel() * step[1].shape[-2]
