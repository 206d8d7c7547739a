"""The curvature of a loss in the outputs of a model, as vectors that are sent back through the model to its layers.

H is the Hessian of one term of the loss in the outputs, and J the derivative of the outputs by the output of a layer.
The layer's G is the mean of Jᵀ H J. So g = Jᵀ s for vectors s with Σ s sᵀ = H, or for a random one with E s sᵀ = H.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from brandla import _check
from brandla.kfac.capture.calls import Pass, Recorder, Terms
from brandla.kfac.capture.layer import Layer
from brandla.kfac.values import Rows

CurvatureType = Literal["empirical", "monte-carlo", "type-2"]
Loss = Literal["cross_entropy", "mse"]


def send_back(
    outputs: Tensor,
    loss: Loss,
    curvature: CurvatureType,
    weights: Tensor | None,
    layers: Sequence[Layer],
    recorder: Recorder,
    seed: int,
) -> None:
    """Send the vectors of a loss's curvature back through the graph of ``outputs``, and keep the graph for the loss.

    Autograd computes the gradients of the layers' outputs alone. It writes to no gradient of a parameter.
    """
    if not outputs.requires_grad:
        rule = "outputs must be the model's, made with gradients enabled, before the loss's backward pass"
        _check.fail_value("KFAC.curvature", f"{rule}; got a tensor that requires no gradient")
    if not outputs.is_floating_point():
        _check.fail_type("KFAC.curvature", f"outputs must be real; got {_check.spelled(outputs.dtype)}")
    for layer in layers:
        layer.capture.forget_discarded("curvature")
    generator = torch.Generator(outputs.device).manual_seed(seed)
    rows, row_weights = _rows_and_weights(outputs, loss, weights)
    recorder.terms["curvature"] = Terms(rows[..., 0].numel() if row_weights is None else row_weights.sum())
    recorder.running = "curvature"
    try:
        # The passes end at the outputs of layers; in compiled graphs, at the weights.
        ends = [part for layer in layers for part in layer.capture.edges or [layer.kind.weight]]
        targets = [part for part in ends if not isinstance(part, Tensor) or part.requires_grad]
        vectors = _hessian_roots(rows, loss, generator, drawn=curvature == "monte-carlo")
        with nullcontext() if recorder.has_run else _reduction_delayed(outputs):
            for recorder.draw, vector in enumerate(vectors):
                weighted = vector if row_weights is None else vector * row_weights.sqrt()[..., None]
                shaped = weighted.reshape(outputs.shape) if outputs.ndim < 2 else weighted.movedim(-1, 1)
                torch.autograd.grad(outputs, targets, shaped.to(outputs.dtype), retain_graph=True, allow_unused=True)
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


def rows_of(layers: Iterable[Layer]) -> dict[Layer, Rows]:
    """Return the rows that these passes brought: γ with N Σ γ γᵀ = Σ g gᵀ / (sum of the weights of all terms).

    A layer's sum counts the terms of all runs, also of runs that did not reach the layer.
    """
    stacked = {layer: layer.rows("curvature", None) for layer in layers}
    terms = terms_of(stacked, "curvature")
    return {layer: rows.of_terms((rows.uses * terms) ** 0.5) for layer, rows in stacked.items() if rows is not None}


def terms_of(layers: Iterable[Layer], pass_name: Pass) -> Tensor | float:
    """Return the number of terms, or the sum of their weights, behind the captured gradients; 0 if it is unknown."""
    runs = [call.terms[pass_name] for layer in layers for call in layer.capture.calls]
    return sum({id(run): run.total for run in runs if run is not None}.values())


def term_count(outputs: Tensor, loss: Loss, weights: Tensor | None) -> Tensor | float:
    """Return the number of terms of a mean: for weights w that sum to 1, it is 1 / Σ w²."""
    rows, row_weights = _rows_and_weights(outputs, loss, weights)
    if row_weights is None:
        return rows[..., 0].numel()
    return row_weights.sum().square() / row_weights.square().sum().clamp_min(torch.finfo(row_weights.dtype).tiny)


def _rows_and_weights(outputs: Tensor, loss: Loss, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return outputs (terms, classes, *positions) as (terms, *positions, classes), and the weights of terms, if any.

    A single dimension holds classes, or for MSE terms. Half precision has too few digits for probabilities.
    """
    rows = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
    if outputs.ndim < 2:
        rows = rows.reshape(1, -1) if loss == "cross_entropy" else rows.reshape(-1, 1)
    else:
        rows = rows.movedim(1, -1)
    if weights is None:
        return rows, None
    if weights.shape != rows.shape[:-1]:
        rule = f"weights must be one for each term, {tuple(rows.shape[:-1])}"
        _check.fail_value("KFAC.curvature", f"{rule}; got shape {tuple(weights.shape)}")
    return rows, weights.to(rows.dtype)


def _hessian_roots(rows: Tensor, loss: Loss, generator: torch.Generator, *, drawn: bool) -> Iterator[Tensor]:
    """Yield vectors s (..., classes) of all terms: one for each class with a random sign, or a single ``drawn`` one.

    The vectors of different terms go back together. Random signs make their products vanish in expectation. If no
    term's gradient reaches another term's inputs, these products are 0 anyway.

    Cross-entropy: √p_c (e_c − p) for each class c, with p = softmax(logits), so that Σ s sᵀ = diag(p) − p pᵀ. Drawn:
    p − e_y with y drawn from p, whose E s sᵀ is the same. MSE: √(2/C) e_c for each component c, so that
    Σ s sᵀ = (2/C) I, the Hessian of the mean of C squares. Drawn: √(2/C) ε with normal ε.
    """
    count, is_mse = rows.shape[-1], loss == "mse"
    scale, p = (2 / count) ** 0.5, rows if is_mse else rows.softmax(-1)
    if drawn and is_mse:
        yield torch.empty_like(rows).normal_(generator=generator) * scale
    elif drawn:
        # Draws as torch.multinomial does, with no sync: for exponential variables E, P(argmax p / E = y) is p_y.
        labels = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
        yield p.scatter_add(-1, labels, -torch.ones_like(p))
    else:
        for label in range(count):
            signs = rows.new_empty(*rows.shape[:-1], 1).bernoulli_(0.5, generator=generator) * 2 - 1
            root = signs * (scale if is_mse else p[..., label : label + 1].sqrt())
            vector = torch.zeros_like(p) if is_mse else -root * p
            vector[..., label] += root[..., 0]
            yield vector


@contextmanager
def _reduction_delayed(outputs: Tensor) -> Iterator[None]:
    """Keep DistributedDataParallel with a static graph from reducing at the end of a pass for the curvature.

    It reduces at the end of its first backward pass, which must be the loss's. Only the first graph has a node for it.
    """
    nodes: list[Any] = [outputs.grad_fn]
    seen = {None}
    delayed: dict[DistributedDataParallel, bool] = {}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            # DistributedDataParallel has left this node in the graph.
            model = node.ddp_weakref() if hasattr(node, "ddp_weakref") else None
            if model is not None and model.static_graph:
                delayed[model] = model._static_graph_delay_allreduce_enqueued
                model._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for model, enqueued in delayed.items():
            model._static_graph_delay_allreduce_enqueued = enqueued
