"""The scale that a gradient scaler multiplies the loss by."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_of(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
    """Return the scale, without reading it back: 1 as the scaler scales it."""
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def is_unscaled(scaler: torch.amp.GradScaler) -> bool:
    """Say whether the gradients of an optimizer have been unscaled since the last update of the scale."""
    # No public attribute tells: a second unscale_ raises, and gradients keep their version.
    states = getattr(scaler, "_per_optimizer_states", None)
    return states is None or any(state["found_inf_per_device"] for state in states.values())
