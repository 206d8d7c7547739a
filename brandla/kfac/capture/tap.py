"""Autograd functions of a capture: one saves inputs, and one hands over gradients inside compiled graphs."""

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
    """Save a tensor for one later read from the result's node. Apply it to `LEAF` and the tensor.

    The node is outside the model's graph, so no backward pass runs through it. As for tensors that layers save, an
    activation checkpoint drops and recomputes the tensor, and ``torch.autograd.graph.save_on_cpu`` moves it.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return torch.empty(0)


class Ticket:
    """Receives the inputs and the output gradients of one module inside compiled graphs.

    Modules of one class share their graph. So the graph holds the ticket's number, as a tensor. The number of a ticket
    that is gone has no effect.
    """

    def __init__(self, kind: Kind, collect: Callable[[Kind, Tensor, Tensor], None]) -> None:
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu")
        self.kind = kind
        self.collect = collect
        _tickets[number] = self


@torch.library.custom_op("brandla_kfac::collect", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def collect(ticket: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Hand inputs and gradient to the ticket; return a copy of the gradient, so that the graph needs the op."""
    receiver = _tickets.get(int(ticket))
    if receiver is not None:
        receiver.collect(receiver.kind, inputs, gradient)
    return gradient.clone()


@collect.register_fake
def _(ticket: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


class Tap(torch.autograd.Function):
    """The identity, whose backward pass hands over the gradient with no break in the graph.

    The output is a copy, since an activation may overwrite it. The compiler fuses the copy with the next operation.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, ticket: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, ticket)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        inputs, ticket = ctx.saved_tensors
        return collect(ticket, inputs, gradients[0]), None, None
