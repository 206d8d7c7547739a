"""Backward passes for the curvature alone: they reach the captures of the layers, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from brandla import _check
from brandla.kfac.capture import fisher
from brandla.kfac.capture.calls import Pass, Recorder, Terms
from brandla.kfac.capture.fisher import CurvatureType, Loss
from brandla.kfac.capture.layer import Layer
from brandla.kfac.values import Rows


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
    generator = torch.Generator(outputs.device).manual_seed(seed)
    recorder.terms["curvature"] = Terms(fisher.total(outputs, loss, weights))
    recorder.running = "curvature"
    try:
        # They may end at the outputs of layers, or at the weights of those in compiled graphs.
        ends = [part for layer in layers for part in layer.capture.edges or [layer.kind.weight]]
        targets = [part for part in ends if not isinstance(part, Tensor) or part.requires_grad]
        with nullcontext() if recorder.has_run else _reductions_left_to_the_loss(outputs):
            for recorder.draw, vector in enumerate(fisher.vectors(outputs, loss, of, weights, generator)):
                torch.autograd.grad(outputs, targets, vector, retain_graph=True, allow_unused=True)
        recorder.has_run = True
    except BaseException:
        recorder.terms["curvature"] = None
        for layer in layers:
            layer.capture.clear()
        raise
    finally:
        recorder.running = "loss"
        recorder.draw = 0
        for layer in layers:
            layer.capture.edges = []


def rows(layers: Iterable[Layer]) -> dict[Layer, Rows]:
    """Return what these passes brought to layers: rows γ with N Σ γ γᵀ = Σ g gᵀ / (sum of the weights of all terms).

    The terms of a run that did not reach a layer count for it too.
    """
    stacked = {layer: layer.rows("curvature", None) for layer in layers}
    total = terms(stacked, "curvature")
    return {layer: found.of_terms((found.uses * total) ** 0.5) for layer, found in stacked.items() if found is not None}


def terms(layers: Iterable[Layer], of: Pass) -> Tensor | float:
    """Return the number of terms, or the sum of their weights, that the captured gradients are about; 0 if untold."""
    told = [call.terms[of] for layer in layers for call in layer.capture.calls]
    return sum({id(run): run.total for run in told if run is not None}.values())


@contextmanager
def _reductions_left_to_the_loss(outputs: Tensor) -> Iterator[None]:
    """Keep DistributedDataParallel with a static graph, which reduces at the end of its first pass, from taking ours.

    Only the first graph has a node that asks for that.
    """
    nodes: list[Any] = [outputs.grad_fn]
    seen = {None}
    models: list[DistributedDataParallel] = []
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            # Such a module has left a node in the graph.
            models += [node.ddp_weakref()] if hasattr(node, "ddp_weakref") else []
    waiting = [model for model in models if model.static_graph]
    known = [model._static_graph_delay_allreduce_enqueued for model in waiting]
    for model in waiting:
        model._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for model, enqueued in zip(waiting, known, strict=True):
            model._static_graph_delay_allreduce_enqueued = enqueued
