"""Capture: what goes into a layer and what gradient comes back to it, by tensor hooks."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from brandla.kfac.kinds import Kind

# Whose gradients a backward pass brings: the loss's own, or draws that stand for its curvature.
Pass = Literal["loss", "curvature"]


class Call:
    """One use of a weight: its input, and what gradients of its output came back."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.gradients: dict[Pass, list[Tensor]] = {"loss": [], "curvature": []}


class Recorder:
    """What all captures of a model have in common: which backward pass is running."""

    def __init__(self) -> None:
        self.running: Pass = "loss"


class Capture:
    """Collects the calls of one weight between two steps.

    Hooks sit on the output tensor of each call, not on the module: the gradient seen is that of the value the layer
    returned, also when an activation overwrites it in place. A forward pass under ``torch.no_grad`` leaves no trace,
    and a call whose output gets no gradient contributes nothing.
    """

    def __init__(self, kind: Kind, recorder: Recorder) -> None:
        self.enabled = True
        self.calls: list[Call] = []
        self._kind = kind
        self._recorder = recorder
        self._fresh = False
        self._accumulated: tuple[Tensor, int] | None = None
        self._handles: list[Any] = []
        self._noting: Tensor | None = None
        self.attach(kind)

    def attach(self, kind: Kind) -> None:
        """Watch a module that uses the weight."""
        self._handles += kind.attach(self._record)

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()

    def gradient_is_pairs(self) -> bool:
        """Say whether nothing but the captured calls can be in the gradient, as far as can be told with no read-back.

        It was empty before the first of them, and nobody has written to it since autograd did.
        """
        gradient = self._kind.weight.grad
        if not self._fresh or self._accumulated is None or gradient is None:
            return False
        noted, version = self._accumulated
        return gradient is noted and gradient._version == version

    def clear(self) -> None:
        """Forget the calls."""
        self.calls = []
        self._fresh = False
        self._accumulated = None

    def _record(self, inputs: Tensor, output: Tensor) -> Tensor:
        weight = self._kind.weight
        if self.enabled and weight.requires_grad and torch.is_grad_enabled() and output.requires_grad:
            self._note_gradients_of(weight)
            call = Call(inputs.detach())
            output.register_hook(lambda gradient: self._collect(call, gradient))
        return output

    def _collect(self, call: Call, gradient: Tensor) -> None:
        if not self.calls:
            self._fresh = self._kind.weight.grad is None
        if not any(call is known for known in self.calls):
            self.calls.append(call)
        call.gradients[self._recorder.running].append(gradient.detach())

    def _note_gradients_of(self, weight: Tensor) -> None:
        """Have the gradient of a weight noted, once it is trainable: a frozen one takes no such hook."""
        if self._noting is not weight:
            self._noting = weight
            self._handles.append(weight.register_post_accumulate_grad_hook(self._note))

    def _note(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self._accumulated = (weight.grad, weight.grad._version)
