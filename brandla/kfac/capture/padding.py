"""Positions without data: they count in no factor."""

from __future__ import annotations

import torch
from torch import Tensor

from brandla.kfac.capture.kinds import Kind, Uses
from brandla.kfac.capture.kinds.kind import full_dtype


def fitting(valid: Tensor, kind: Kind, inputs: Tensor, gradient: Tensor, *, batch_first: bool) -> Tensor | None:
    """Return the mask (samples, positions) for a call with samples first; None where the call is of another shape.

    A call may have all positions of all samples in one dimension, in an order that ``batch_first`` tells; then each of
    them is a sample.
    """
    if not (kind.may_lead or kind.positions_first):
        return None
    leading = valid.T if kind.positions_first else valid
    if inputs.shape[:2] == gradient.shape[:2] == leading.shape and gradient.ndim > 2:
        return valid
    if inputs.shape[:1] == gradient.shape[:1] == (valid.numel(),) and gradient.ndim == 2:
        return (valid if batch_first else valid.T).reshape(-1, 1)
    return None


def uses(kind: Kind, inputs: Tensor, gradient: Tensor, valid: Tensor, *, reduce: bool) -> tuple[Uses, Tensor]:
    """Return the uses of a call with those of other positions all 0, and a mask (samples, positions) of the others.

    ``reduce`` averages and sums over the positions of a sample that have data, where the kind does.
    """
    if kind.single:
        leading = valid.reshape(gradient.shape[: 1 if gradient.ndim == 2 else 2])
        gradient = gradient.masked_fill(~leading[(..., *[None] * (gradient.ndim - leading.ndim))], 0)
        return kind.uses(inputs, gradient), valid.any(-1, keepdim=True)
    found = kind.uses(inputs, gradient)
    valid = valid.repeat_interleave(found.gradients.shape[-2] // valid.shape[1], dim=1)
    empty = ~valid[..., None]
    gradients = found.gradients.masked_fill(empty, 0)
    if kind.one_hot:
        return Uses(found.inputs.masked_fill(empty, -1), gradients), valid
    # The bias's 1 is one of the inputs.
    ones = torch.ones_like(found.inputs[..., :1]) if found.ones is None else found.ones
    cleared = found.inputs.masked_fill(empty, 0), gradients, ones.masked_fill(empty, 0)
    if not reduce or kind.turned:
        return Uses(*cleared), valid
    counts = valid.sum(-1)[..., None, None]
    inputs, gradients, ones = (part.sum(-2, keepdim=True, dtype=full_dtype(part)) for part in cleared)
    return Uses(inputs / counts.clamp_min(1), gradients, ones / counts.clamp_min(1)), counts[..., 0] > 0
