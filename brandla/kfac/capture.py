"""Capture: what goes into a layer and what gradient comes back to it, by tensor hooks."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Sharing = Literal["expand", "reduce"]


class Pair(NamedTuple):
    """Input (samples, *positions, d_in) and output gradient (samples, *positions, d_out) of one call of a layer."""

    inputs: Tensor
    gradients: Tensor

    @property
    def samples(self) -> int:
        """Size of the leading dimension; 1 for a single vector."""
        return self.inputs.shape[0] if self.inputs.ndim > 1 else 1

    @property
    def positions(self) -> int:
        """Number of weight uses a sample: the product of the dimensions between the first and the last."""
        return self.inputs.shape[1:-1].numel() if self.inputs.ndim > 2 else 1

    def rows(self) -> Pair:
        """Return the pair with one row for every sample and position."""
        return Pair(*(part.reshape(-1, part.shape[-1]) for part in self))

    def reduced(self) -> Pair:
        """Return the pair with one row a sample: inputs averaged and gradients summed over positions."""
        inputs, gradients = (part.reshape(self.samples, self.positions, part.shape[-1]) for part in self)
        return Pair(inputs.mean(1), gradients.sum(1))


class Capture:
    """Collects the pairs of one Linear weight between two steps.

    Hooks sit on the output tensor of each call, not on the module: the gradient seen is that of the value the layer
    returned, also when an activation overwrites it in place. A forward pass under ``torch.no_grad`` leaves no trace,
    and a call whose output gets no gradient contributes no pair.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.enabled = True
        self.pairs: list[Pair] = []
        self._weight = weight
        self._fresh = False
        self._accumulated: tuple[Tensor, int] | None = None
        self._handles: list[Any] = [weight.register_post_accumulate_grad_hook(self._note_gradient)]

    def attach(self, module: nn.Linear) -> None:
        """Watch a module that uses the weight."""
        self._handles.append(module.register_forward_hook(self._watch_output, with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()

    def gradient_is_pairs(self) -> bool:
        """Say whether nothing but the captured calls can be in the gradient, as far as can be told with no read-back.

        It was empty before the first of them, and nobody has written to it since autograd did.
        """
        gradient = self._weight.grad
        if not self._fresh or self._accumulated is None or gradient is None:
            return False
        noted, version = self._accumulated
        return gradient is noted and gradient._version == version

    def clear(self) -> None:
        """Forget the pairs."""
        self.pairs = []
        self._fresh = False
        self._accumulated = None

    def _watch_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not (self.enabled and torch.is_grad_enabled() and output.requires_grad):
            return
        inputs = (args[0] if args else kwargs["input"]).detach()
        output.register_hook(lambda gradient: self._collect(inputs, gradient))

    def _collect(self, inputs: Tensor, gradient: Tensor) -> None:
        if not self.pairs:
            self._fresh = self._weight.grad is None
        self.pairs.append(Pair(inputs, gradient.detach()))

    def _note_gradient(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self._accumulated = (weight.grad, weight.grad._version)
