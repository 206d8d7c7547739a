"""Weights whose gradient autograd does not form: the rows of their calls give it, or a step in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from brandla._sharded import is_dtensor
from brandla.kfac.capture.kinds import Kind
from brandla.kfac.capture.kinds.kind import OwnHook


class Switch:
    """Turns ``requires_grad`` of a weight off while its module's forward pass runs.

    The bias is trained and gets its gradient from autograd: so there is a graph in any case, and the bias's gradient
    tells when one came. ``is_wanted`` says whether the call will be captured, and nobody else needs the gradient.
    """

    def __init__(self, kind: Kind, is_wanted: Callable[[], bool]) -> None:
        self.kind = kind
        self.is_off = False
        self._is_wanted = is_wanted
        self._weight: Tensor | None = None

    def attach(self) -> list[Any]:
        """Put the hooks around the forward pass, the last one before all that look at the output."""
        module = self.kind.module
        return [
            module.register_forward_pre_hook(OwnHook(module, self.off)),
            module.register_forward_hook(OwnHook(module, self.on), prepend=True, always_call=True),
        ]

    def off(self, *_: Any) -> None:
        """Leave the gradient out of the call that comes, if it may be."""
        self.is_off = self._may_be_left_out() and self._is_wanted()
        if self.is_off:
            self._weight = self.kind.weight.requires_grad_(False)

    def on(self, *_: Any) -> None:
        """Have the weight be trained again; ``is_off`` still tells of the call."""
        if self._weight is not None:
            self._weight.requires_grad_(True)
            self._weight = None

    def _may_be_left_out(self) -> bool:
        """Say whether a captured call will have all that there is to the gradient."""
        if torch.compiler.is_compiling() or is_functional() or not torch.is_grad_enabled():
            return False
        weight, bias = self.kind.weight, self.kind.bias
        if not all(isinstance(part, nn.Parameter) and not is_dtensor(part) for part in (weight, bias)):
            return False
        trained: bool = weight.requires_grad
        return trained


def is_functional() -> bool:
    """Say whether torch.func is differentiating: no gradient gets to a weight then."""
    # The compiler takes None for an object here, but not for one of the type.
    return isinstance(torch._C._functorch.peek_interpreter_stack(), torch._C._functorch.CInterpreter)
