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
    for layer in layers:
        layer.capture.forget_discarded("curvature")
    generator = torch.Generator(outputs.device).manual_seed(seed)
    recorder.terms["curvature"] = Terms(total(outputs, loss, weights))
    recorder.running = "curvature"
    try:
        # They may end at the outputs of layers, or at the weights of those in compiled graphs.
        ends = [part for layer in layers for part in layer.capture.edges or [layer.kind.weight]]
        targets = [part for part in ends if not isinstance(part, Tensor) or part.requires_grad]
        with nullcontext() if recorder.has_run else _reductions_left_to_the_loss(outputs):
            for recorder.draw, vector in enumerate(vectors(outputs, loss, of, weights, generator)):
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


def vectors(
    outputs: Tensor, loss: Loss, of: CurvatureType, weights: Tensor | None, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield s of all terms at once, each of the shape of ``outputs``: one that is drawn, or one for each class.

    The terms are along all dimensions but the classes'. Where ``"type-2"`` sends several back together, each has a
    random sign: products of different terms then vanish in expectation, and are 0 anyway where no term's gradient
    reaches another's inputs.
    """
    if not outputs.is_floating_point():
        _check.fail_type("KFAC.curvature", f"outputs must be real; got {_check.spelled(outputs.dtype)}")
    # Classes last; half precision has too few digits for probabilities.
    rows = by_term(outputs.detach(), loss)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    root = _checked(weights, rows).sqrt()[..., None]
    make = _of_cross_entropy if loss == "cross_entropy" else _of_squares
    for vector in make(rows, generator, drawn=of == "monte-carlo"):
        own = root * vector
        yield (own.reshape(outputs.shape) if outputs.ndim < 2 else own.movedim(-1, 1)).to(outputs.dtype)


def by_term(outputs: Tensor, loss: Loss) -> Tensor:
    """View (terms, classes, *positions) as (terms, *positions, classes); one dimension is classes, or terms of MSE."""
    if outputs.ndim < 2:
        return outputs.reshape(1, -1) if loss == "cross_entropy" else outputs.reshape(-1, 1)
    return outputs.movedim(1, -1)


def total(outputs: Tensor, loss: Loss, weights: Tensor | None) -> Tensor | float:
    """Return the sum of the weights of all terms, 1 each unless given."""
    rows = by_term(outputs.detach(), loss)
    return rows[..., 0].numel() if weights is None else _checked(weights, rows).sum()


def number(outputs: Tensor, loss: Loss, weights: Tensor | None) -> Tensor | float:
    """Return the number of terms of a mean: of weights w whose sum is 1 it is 1 / Σ w²."""
    if weights is None:
        return total(outputs, loss, None)
    own = _checked(weights, by_term(outputs.detach(), loss))
    return own.sum().square() / own.square().sum().clamp_min(torch.finfo(own.dtype).tiny)


def _checked(weights: Tensor | None, rows: Tensor) -> Tensor:
    if weights is None:
        return rows.new_ones(())
    if weights.shape != rows.shape[:-1]:
        shapes = f"one for each term, {tuple(rows.shape[:-1])}; got shape {tuple(weights.shape)}"
        _check.fail_value("KFAC.curvature", f"weights must be {shapes}")
    return weights.to(rows.dtype)


def _of_cross_entropy(logits: Tensor, generator: torch.Generator, *, drawn: bool) -> Iterator[Tensor]:
    """√p_c (e_c − p) for each class c, p = softmax(logits): Σ s sᵀ = diag(p) − p pᵀ.

    Or one column p − e_y, y ``drawn`` from p: E s sᵀ is the same.
    """
    p = logits.softmax(-1)
    if drawn:
        # As torch.multinomial draws one: with exponential variables E, P(argmax p / E = y) is p_y. No sync.
        labels = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)
        yield p.scatter_add(-1, labels, -torch.ones_like(p))
        return
    for label in range(p.shape[-1]):
        root = _signed_ones(p, generator) * p[..., label : label + 1].sqrt()
        vector = -root * p
        vector[..., label] += root[..., 0]
        yield vector


def _of_squares(outputs: Tensor, generator: torch.Generator, *, drawn: bool) -> Iterator[Tensor]:
    """√(2/C) e_c for each component c: Σ s sᵀ = (2/C) I, the Hessian of the mean of C squares.

    Or √(2/C) ε with normal ε ``drawn``: E s sᵀ is the same.
    """
    scale = (2 / outputs.shape[-1]) ** 0.5
    if drawn:
        yield torch.empty_like(outputs).normal_(generator=generator) * scale
        return
    for component in range(outputs.shape[-1]):
        vector = torch.zeros_like(outputs)
        vector[..., component] = _signed_ones(outputs, generator)[..., 0] * scale
        yield vector


def _signed_ones(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return ±1 for each term."""
    ones = torch.empty(*rows.shape[:-1], 1, dtype=rows.dtype, device=rows.device)
    return ones.bernoulli_(0.5, generator=generator) * 2 - 1


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
