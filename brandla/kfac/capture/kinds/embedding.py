"""``nn.Embedding``: a Linear of one-hot inputs, whose input factor is diagonal."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import Kind, Uses, wrong_shape


class EmbeddingKind(Kind):
    """An embedding: d_in is the number of entries, d_out their size, inputs are indices and −1 for padding.

    Positions are rows in every sharing: an average of one-hot inputs would not be one-hot.
    """

    types: ClassVar[tuple[type[Any], ...]] = (nn.Embedding,)
    one_hot = True
    may_lead = True
    transposed = True

    @classmethod
    def left(cls, module: nn.Module) -> str:
        """Say so where its gradient is not the sum over its calls, or sparse."""
        embedding: Any = module
        if embedding.sparse:
            return "its gradient is sparse"
        return "its gradient is scaled by frequency" if embedding.scale_grad_by_freq else ""

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """Size of an entry, and number of entries."""
        entries, size = self.weight.shape
        return (), size, entries

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        """Say so where the output is not an entry for each index."""
        return wrong_shape(output, (*inputs.shape, self.weight.shape[1]))

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


class TurnedEmbeddingKind(EmbeddingKind):
    """An embedding whose weight is also a Linear's: a use of Wᵀ, given as one of W.

    Its rows are those of the Linear's matrix (entries, size): the one-hot row stands where the gradient of an output
    does, and the gradient of the entry where the input does. A bias has no part in it.
    """

    one_hot = False
    transposed = False
    turned = True

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """Number of entries, and size of an entry."""
        entries, size = self.weight.shape
        return (), entries, size

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return the gradients of entries, and dense one-hot rows; both are 0 for padding."""
        indices, gradients, _ = super().uses(inputs, gradient)
        one_hot = gradients.new_zeros(*gradients.shape[:-1], self.shape[1])
        one_hot.scatter_(-1, indices.clamp_min(0), (indices >= 0).to(one_hot.dtype))
        return Uses(gradients, one_hot, gradients.new_zeros(*gradients.shape[:-1], 1))
