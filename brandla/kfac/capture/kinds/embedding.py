"""``nn.Embedding``: a Linear of one-hot inputs, whose input factor is diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import Kind, Uses, is_called_as, why_left


class EmbeddingKind(Kind):
    """An embedding: d_in is the number of entries, d_out their size, inputs are indices and −1 for padding.

    Positions are rows in every sharing: an average of one-hot inputs would not be one-hot.
    """

    one_hot = True

    @classmethod
    def of(cls, module: nn.Module) -> list[Kind] | str | None:
        """Return the weight of an embedding."""
        if not isinstance(module, nn.Embedding):
            return None
        if not is_called_as(module, nn.Embedding):
            return f"{type(module).__name__} has a forward pass of its own"
        if module.sparse:
            return "its gradient is sparse"
        if module.scale_grad_by_freq:
            return "its gradient is scaled by frequency"
        return why_left(module, "weight") or [cls(module)]

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """Size of an entry, and number of entries."""
        entries, size = self.weight.shape
        return (), size, entries

    def refusal(self, inputs: object, output: object) -> str:
        """Say so where the output is not an entry for each index."""
        if reason := super().refusal(inputs, output):
            return reason
        assert isinstance(inputs, Tensor)
        assert isinstance(output, Tensor)
        wanted = (*inputs.shape, self.weight.shape[1])
        if output.shape != wanted:
            return f"its output has shape {tuple(output.shape)}, where the input makes {wanted}"
        return ""

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return indices and their gradients; padding, which autograd leaves out too, has −1 and 0."""
        samples = inputs.shape[0] if inputs.ndim else 1
        indices = inputs.reshape(samples, -1)
        gradients = gradient.reshape(*indices.shape, gradient.shape[-1])
        embedding: Any = self.module
        if embedding.padding_idx is not None:
            padding = indices == embedding.padding_idx
            indices = torch.where(padding, -1, indices)
            gradients = torch.where(padding[..., None], 0, gradients)
        return Uses(indices[..., None], gradients)

    def reduced(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return the same as without sharing over positions."""
        return self.uses(inputs, gradient)

    def matrix(self, weight: Tensor) -> Tensor:
        """Transpose."""
        return weight.mT

    def tensor(self, matrix: Tensor) -> Tensor:
        """Transpose."""
        return matrix.mT
