"""One use of a weight: its input, and the gradients of its output."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

from brandla.kfac.capture.kinds.kind import Kind, Uses

# A backward pass brings the gradients of the loss, or vectors whose outer products are the curvature of the loss.
Pass = Literal["loss", "curvature"]


@dataclass(eq=False)
class Terms:
    """The terms of a loss in one call of `KFAC.curvature`: their number, or the sum of their weights."""

    total: Tensor | float


@dataclass(eq=False)
class Groups:
    """The sample of each row of the inputs, for batches whose rows are the nodes of several graphs."""

    index: Tensor
    count: int


def averaged(uses: Uses, valid: Tensor | None, groups: Groups | None) -> tuple[Uses, Tensor | None]:
    """Average the inputs and sum the gradients of each sample or group: (rows, positions, d) to (samples, 1, d).

    Rows of padding are 0. ``valid`` (rows, positions) marks the others and gives a mask (samples, 1); without it, None.
    """

    def summed(part: Tensor) -> Tensor:
        sums = part.sum(-2, keepdim=True, dtype=uses.gradients.dtype)
        if groups is None:
            return sums
        return sums.new_zeros(groups.count, *sums.shape[1:]).index_add_(0, groups.index.to(sums.device), sums)

    mask = torch.ones_like(uses.gradients[..., 0]) if valid is None else valid
    counts = summed(mask[..., None])
    inputs, gradients = summed(uses.inputs) / counts.clamp_min(1), summed(uses.gradients)
    if valid is None:
        return Uses(inputs, gradients), None
    ones = (counts > 0).to(inputs.dtype).expand(*inputs.shape[:-1], 1)
    return Uses(inputs, gradients, ones), counts[..., 0] > 0


@dataclass(eq=False)
class Call:
    """One use of a weight: the kind that makes rows of it, its input, and the gradients of its output."""

    kind: Kind
    # Returns the input; None once it has been called, or the call has been released.
    fetch: Callable[[], Tensor] | None
    _: KW_ONLY
    # Whether the call is inside a graph of torch.compile.
    compiled: bool = False
    # Whether autograd does not form the weight's gradient in this call.
    left_out: bool = False
    # Set if several rows of the inputs are one sample.
    groups: Groups | None = None
    # The positions of the batch that are not padding, (samples, positions).
    valid: Tensor | None = None
    # The terms of the loss that the last gradients of each kind belong to.
    terms: dict[Pass, Terms | None] = field(default_factory=lambda: {"loss": None, "curvature": None})
    gradients: dict[Pass, list[Tensor]] = field(default_factory=lambda: {"loss": [], "curvature": []})
    # Autograd's number of the backward pass that brought each gradient of the loss.
    tasks: list[int] = field(default_factory=list)
    # The input, once a gradient has arrived.
    inputs: Any = None

    def add(self, gradient: Tensor, recorder: Recorder) -> None:
        """Store a gradient. The first one also fetches the input, which autograd has saved."""
        if self.fetch is not None:
            self.inputs, self.fetch = self.fetch(), None
        self.terms[recorder.running] = recorder.terms[recorder.running]
        if recorder.running == "loss":
            self.tasks.append(torch._C._current_graph_task_id())
        self.gradients[recorder.running].append(gradient)

    def keep(self, tasks: Container[int]) -> None:
        """Forget the loss's gradients, except those of these backward passes."""
        kept = [pair for pair in zip(self.tasks, self.gradients["loss"], strict=True) if pair[0] in tasks]
        self.tasks = [task for task, _ in kept]
        self.gradients["loss"] = [gradient for _, gradient in kept]

    def release(self) -> int:
        """Forget all data, and return its size in bytes."""
        held: int = 0 if self.inputs is None else self.inputs.nbytes
        held += sum(map(attrgetter("nbytes"), chain(*self.gradients.values())))
        self.fetch = self.inputs = None
        self.tasks = []
        self.gradients = {"loss": [], "curvature": []}
        return held


@dataclass(eq=False)
class Recorder:
    """The backward pass that is running, shared by all captures of a model.

    ``draw`` counts the passes for the curvature through one graph. ``has_run`` is True once such passes have ended.
    ``terms`` are the loss's terms behind the next gradients of each kind, if `KFAC.curvature` has given any.
    """

    running: Pass = "loss"
    draw: int = 0
    terms: dict[Pass, Terms | None] = field(default_factory=lambda: {"loss": None, "curvature": None})
    has_run: bool = False
    # The graphs whose nodes are the rows of the next calls.
    groups: Groups | None = None
    # The positions of the next calls that are not padding.
    valid: Tensor | None = None
    # Whether captures note the gradient edges of their outputs, at which backward passes for the curvature end.
    edges: bool = False

    def forget_terms(self) -> None:
        """Forget the terms, until `KFAC.curvature` gives new ones."""
        self.terms = dict.fromkeys(self.terms)
