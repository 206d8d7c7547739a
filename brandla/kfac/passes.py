"""Backward passes for the curvature alone: they reach the captures of the layers, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac import fisher
from brandla.kfac.capture import Recorder, Terms
from brandla.kfac.fisher import CurvatureType, Loss
from brandla.kfac.layer import Layer
from brandla.kfac.strategy import Rows


def send_back(
    outputs: Tensor,
    loss: Loss,
    of: CurvatureType,
    weights: Tensor | None,
    layers: Sequence[Layer],
    recorder: Recorder,
    seed: int,
) -> None:
    """Send the vectors of a loss's curvature back through the graph of ``outputs``, which stays for the loss.

    The gradient of no parameter is written to, and none is computed but those of the outputs of layers.
    """
    if not outputs.requires_grad:
        rule = "outputs must be what the model gave with gradients enabled, before the loss's backward pass"
        _check.fail_value("KFAC.curvature", f"{rule}; got a tensor that requires no gradient")
    for layer in layers:
        layer.capture.forget_discarded("curvature")
    generator = torch.Generator(outputs.device)
    generator.manual_seed(seed + _rank())
    recorder.terms = Terms(fisher.total(outputs, loss, weights))
    recorder.running = "curvature"
    try:
        targets = _targets(layers)
        for recorder.draw, vector in enumerate(fisher.vectors(outputs, loss, of, weights, generator)):
            torch.autograd.grad(outputs, targets, vector, retain_graph=True, allow_unused=True)
    except BaseException:
        recorder.terms = None
        for layer in layers:
            layer.capture.clear()
        raise
    finally:
        recorder.running = "loss"
        recorder.draw = 0
        for layer in layers:
            layer.capture.edges = []


def rows(layer: Layer) -> Rows | None:
    """Return what these passes brought: rows γ with N Σ γ γᵀ the sum of g gᵀ over that of the terms' weights."""
    found = layer.rows("curvature", None)
    if found is None:
        return None
    totals = {id(call.terms): call.terms.total for call in layer.capture.calls if call.terms is not None}
    divisor = (found.uses * sum(totals.values())) ** 0.5
    gradients = found.gradients / divisor
    # Those of single layers are in both places.
    return found._replace(inputs=gradients if found.single else found.inputs, gradients=gradients)


def _targets(layers: Iterable[Layer]) -> list[Any]:
    """Return where passes may end: at the outputs of layers, or at the weights of those in compiled graphs."""
    targets: list[Any] = []
    for layer in layers:
        if layer.capture.edges:
            targets += layer.capture.edges
        elif layer.kind.weight.requires_grad:
            targets.append(layer.kind.weight)
    return targets


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
