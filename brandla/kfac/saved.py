"""A tensor kept for the backward pass where autograd keeps its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LEAF = torch.zeros((), requires_grad=True)


class Saved:
    """A tensor to be fetched in a backward pass, once.

    `Saved.of` hands it to autograd, outside the model's graph: an activation checkpoint drops it and computes it
    again, and ``torch.autograd.graph.save_on_cpu`` moves it, as they do with what the layers save themselves.
    """

    def __init__(self, tensor: Tensor | None = None, kept: Tensor | None = None) -> None:
        self._tensor = tensor
        # A node of Python's lives no longer than the results it made, whoever else holds it (torch up to 2.12).
        self._kept = kept

    @classmethod
    def of(cls, tensor: Tensor) -> Saved:
        """Let autograd keep a tensor."""
        # torch leaves Function.apply without annotations.
        kept: Tensor = _Keep.apply(_LEAF, tensor.detach())  # type: ignore[no-untyped-call]
        return cls(kept=kept)

    def fetch(self) -> Tensor:
        """Return the tensor."""
        if self._tensor is not None:
            return self._tensor
        assert self._kept is not None
        node: Any = self._kept.grad_fn
        tensor: Tensor = node.saved_tensors[0]
        return tensor


class _Keep(torch.autograd.Function):
    """Save a tensor; the result is of no use but for its node. It has no part in any backward pass."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # Nothing comes after what this returned: it is kept for its saved tensor alone.
        raise NotImplementedError
