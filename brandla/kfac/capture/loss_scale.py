"""The scale that a gradient scaler multiplies the loss by."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """Return the scale, without reading it back; None where there is no scaler that is in use.

    Or raise, if the gradients of no optimizer have been unscaled since the last update of the scale.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    # No public attribute tells: a second unscale_ raises, and gradients keep their version.
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is not None and not any(state["found_inf_per_device"] for state in states.values()):
        message = (
            "KFAC.step: gradients must be divided by the scale of the loss first; call scaler.unscale_(optimizer)"
            " between loss.backward() and preconditioner.step()"
        )
        raise RuntimeError(message)
    # 1, as the scaler scales it.
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale
