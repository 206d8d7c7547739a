"""The curvature of a loss in the outputs of a model, as vectors that are sent back through it to the layers alone.

With H the Hessian of one term of the loss in its outputs and J the derivative of the outputs by what a layer gives,
the layer's G is the mean of Jᵀ H J. So g = Jᵀ s for vectors s with Σ s sᵀ = H, or E s sᵀ = H for one that is drawn.
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
    if not outputs.is_floating_point():
        _check.fail_type("KFAC.curvature", f"outputs must be real; got {_check.spelled(outputs.dtype)}")
    for layer in layers:
        layer.capture.forget_discarded("curvature")
    generator = torch.Generator(outputs.device).manual_seed(seed)
    rows, own = _by_term(outputs, loss, weights)
    recorder.terms["curvature"] = Terms(rows[..., 0].numel() if own is None else own.sum())
    recorder.running = "curvature"
    try:
        # They may end at the outputs of layers, or at the weights of those in compiled graphs.
        ends = [part for layer in layers for part in layer.capture.edges or [layer.kind.weight]]
        targets = [part for part in ends if not isinstance(part, Tensor) or part.requires_grad]
        with nullcontext() if recorder.has_run else _reductions_left_to_the_loss(outputs):
            for recorder.draw, vector in enumerate(_vectors(rows, loss, generator, drawn=of == "monte-carlo")):
                weighted = vector if own is None else vector * own.sqrt()[..., None]
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
    """Return what these passes brought to layers: rows γ with N Σ γ γᵀ = Σ g gᵀ / (sum of the weights of all terms).

    The terms of a run that did not reach a layer count for it too.
    """
    stacked = {layer: layer.rows("curvature", None) for layer in layers}
    told = terms_of(stacked, "curvature")
    return {layer: found.of_terms((found.uses * told) ** 0.5) for layer, found in stacked.items() if found is not None}


def terms_of(layers: Iterable[Layer], of: Pass) -> Tensor | float:
    """Return the number of terms, or the sum of their weights, that the captured gradients are about; 0 if untold."""
    told = [call.terms[of] for layer in layers for call in layer.capture.calls]
    return sum({id(run): run.total for run in told if run is not None}.values())


def number(outputs: Tensor, loss: Loss, weights: Tensor | None) -> Tensor | float:
    """Return the number of terms of a mean: of weights w whose sum is 1 it is 1 / Σ w²."""
    rows, own = _by_term(outputs, loss, weights)
    if own is None:
        return rows[..., 0].numel()
    return own.sum().square() / own.square().sum().clamp_min(torch.finfo(own.dtype).tiny)


def _by_term(outputs: Tensor, loss: Loss, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return outputs (terms, classes, *positions) as (terms, *positions, classes), and the weights of terms, if any.

    One dimension is classes, or terms of MSE. Half precision has too few digits for probabilities.
    """
    rows = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
    if outputs.ndim < 2:
        rows = rows.reshape(1, -1) if loss == "cross_entropy" else rows.reshape(-1, 1)
    else:
        rows = rows.movedim(1, -1)
    if weights is None:
        return rows, None
    if weights.shape != rows.shape[:-1]:
        shapes = f"one for each term, {tuple(rows.shape[:-1])}; got shape {tuple(weights.shape)}"
        _check.fail_value("KFAC.curvature", f"weights must be {shapes}")
    return rows, weights.to(rows.dtype)


def _vectors(rows: Tensor, loss: Loss, generator: torch.Generator, *, drawn: bool) -> Iterator[Tensor]:
    """Yield s of all terms (..., classes) at once: one that is ``drawn``, or one for each class with a random sign.

    Vectors of different terms go back together: with signs, their products vanish in expectation. They are 0 anyway
    where no term's gradient reaches another's inputs.

    Cross-entropy: √p_c (e_c − p) for each class c, p = softmax(logits), so that Σ s sᵀ = diag(p) − p pᵀ; or one column
    p − e_y, y drawn from p: E s sᵀ is the same. MSE: √(2/C) e_c for each component c, so that Σ s sᵀ = (2/C) I, the
    Hessian of the mean of C squares; or √(2/C) ε with normal ε.
    """
    count, is_mse = rows.shape[-1], loss == "mse"
    scale, p = (2 / count) ** 0.5, rows if is_mse else rows.softmax(-1)
    if drawn and is_mse:
        yield torch.empty_like(rows).normal_(generator=generator) * scale
    elif drawn:
        # As torch.multinomial draws one: with exponential variables E, P(argmax p / E = y) is p_y. No sync.
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
def _reductions_left_to_the_loss(outputs: Tensor) -> Iterator[None]:
    """Keep DistributedDataParallel with a static graph, which reduces at the end of its first pass, from taking ours.

    Only the first graph has a node that asks for that.
    """
    nodes: list[Any] = [outputs.grad_fn]
    seen = {None}
    waiting: dict[DistributedDataParallel, bool] = {}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            # Such a module has left a node in the graph.
            model = node.ddp_weakref() if hasattr(node, "ddp_weakref") else None
            if model is not None and model.static_graph:
                waiting[model] = model._static_graph_delay_allreduce_enqueued
                model._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for model, enqueued in waiting.items():
            model._static_graph_delay_allreduce_enqueued = enqueued
