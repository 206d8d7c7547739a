"""What autograd holds for a capture: inputs, and the taps that hand over gradients inside compiled graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from brandla.kfac.capture.kinds.kind import Kind

LEAF = torch.zeros((), device="cpu", requires_grad=True)
_numbers = itertools.count()
_tickets: WeakValueDictionary[int, Ticket] = WeakValueDictionary()


class Keep(torch.autograd.Function):
    """Save a tensor, applied to `LEAF` and that: the result is of no use but for its node, which gives it back once.

    It is outside the model's graph, in no backward pass: an activation checkpoint drops it and computes it again, and
    ``torch.autograd.graph.save_on_cpu`` moves it, as they do with what the layers save themselves.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return torch.empty(0)


class Ticket:
    """The one that is told of the inputs and the output gradients of one module.

    A graph holds its number, as a tensor, since modules of one class share their graph. A number whose owner is gone
    has no effect.
    """

    def __init__(self, kind: Kind, collect: Callable[[Kind, Tensor, Tensor], None]) -> None:
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu")
        self.kind = kind
        self.collect = collect
        _tickets[number] = self


@torch.library.custom_op("brandla_kfac::collect", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def collect(ticket: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Tell the owner of the ticket; return a copy of the gradient, for which the graph cannot leave the op out."""
    owner = _tickets.get(int(ticket))
    if owner is not None:
        owner.collect(owner.kind, inputs, gradient)
    return gradient.clone()


@collect.register_fake
def _(ticket: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


class Tap(torch.autograd.Function):
    """The identity, whose backward pass hands over the gradient with no break in the graph.

    It is a copy, since an activation may overwrite it. The compiler fuses it with what comes next.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, ticket: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, ticket)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs, ticket = ctx.saved_tensors
        return collect(ticket, inputs, gradients[0]), None, None
