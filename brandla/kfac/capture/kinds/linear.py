"""``nn.Linear``, ``nn.Bilinear``, and embeddings: Linears of one-hot inputs, whose input factor is diagonal."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from brandla.kfac.capture.kinds.kind import Kind, Uses, by_sample, wrong_shape


class LinearKind(Kind):
    """A Linear: rows are samples and the positions between the first and the last dimension."""

    types = (nn.Linear,)
    leaves_out = True
    may_lead = True

    @classmethod
    def left(cls, module: Any) -> str:
        of_attention = isinstance(module, NonDynamicallyQuantizableLinear)
        return "the attention that holds it never calls it" if of_attention else ""

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        return wrong_shape(output, (*inputs.shape[:-1], self.shape[1]))


class TransposedKind(LinearKind):
    """x weight + bias, as the ``Conv1D`` of transformers computes it."""

    leaves_out = False
    transposed = True


class BilinearKind(Kind):
    """A Linear of x yᵀ as a vector: d_in is the product of both inputs' sizes."""

    types = (nn.Bilinear,)
    may_lead = True

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        d_out, first, second = self.weight.shape
        return (), d_out, first * second

    def of_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kind, Any]:
        pair = [*args, *(kwargs[name] for name in ("input1", "input2")[len(args) :])]
        return self, torch.cat([part.detach() for part in pair], -1)

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        first, second = by_sample(inputs).split(self.weight.shape[1:], -1)
        return Uses((first[..., :, None] * second[..., None, :]).flatten(-2), by_sample(gradient))


class EmbeddingKind(Kind):
    """An embedding: d_in is the number of entries, d_out their size, inputs are indices and −1 for padding.

    Positions are rows in every sharing: an average of one-hot inputs would not be one-hot.
    """

    types: ClassVar[tuple[type[Any], ...]] = (nn.Embedding,)
    one_hot = True
    may_lead = True
    transposed = True

    @classmethod
    def left(cls, module: Any) -> str:
        if module.sparse:
            return "its gradient is sparse"
        return "its gradient is scaled by frequency" if module.scale_grad_by_freq else ""

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        return wrong_shape(output, (*inputs.shape, self.weight.shape[1]))

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return indices and their gradients; padding, which autograd leaves out too, has −1 and 0."""
        samples = inputs.shape[0] if inputs.ndim else 1
        indices = inputs.reshape(samples, -1)
        gradients = gradient.reshape(*indices.shape, gradient.shape[-1])
        if self.module.padding_idx is not None:
            padding = indices == self.module.padding_idx
            indices = torch.where(padding, -1, indices)
            gradients = torch.where(padding[..., None], 0, gradients)
        return Uses(indices[..., None], gradients)


class TurnedEmbeddingKind(EmbeddingKind):
    """An embedding whose weight is also a Linear's: a use of Wᵀ, given as one of W.

    Its rows are those of the Linear's matrix (entries, size): the one-hot row stands where the gradient of an output
    does, and the gradient of the entry where the input does. A bias has no part in it.
    """

    one_hot = False
    transposed = False
    turned = True

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return the gradients of entries, and dense one-hot rows; both are 0 for padding."""
        indices, gradients, _ = super().uses(inputs, gradient)
        one_hot = gradients.new_zeros(*gradients.shape[:-1], self.shape[1])
        one_hot.scatter_(-1, indices.clamp_min(0), (indices >= 0).to(one_hot.dtype))
        return Uses(gradients, one_hot, gradients.new_zeros(*gradients.shape[:-1], 1))


class BagKind(EmbeddingKind):
    """An embedding whose entries are added up: the gradient of each is that of its bag, over the length in a mean."""

    types: ClassVar[tuple[type[Any], ...]] = (nn.EmbeddingBag,)
    # What its inputs hold are entries of bags, and no positions.
    may_lead = False
    _offsets: Tensor | None = None

    @classmethod
    def left(cls, module: Any) -> str:
        return super().left(module) or ("its gradient is that of a maximum" if module.mode == "max" else "")

    def of_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kind, Any]:
        """Return a kind that knows where the bags begin; no input where entries are weighted."""
        given = {**dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)), **kwargs}
        inputs = given["input"] if given.get("per_sample_weights") is None else "weighted indices"
        return self.knowing(_offsets=given.get("offsets")), inputs

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        """Nothing can be wrong with indices that the module has taken."""
        return ""

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return one sample for each index; padding has −1 and 0."""
        indices = inputs.flatten()
        if self._offsets is None:
            of_index = torch.arange(len(inputs), device=inputs.device).repeat_interleave(inputs.shape[1])
        else:
            places = torch.arange(len(indices), device=inputs.device, dtype=self._offsets.dtype)
            of_index = torch.searchsorted(self._offsets, places, right=True) - 1
        gradients = gradient[of_index]
        if self.module.mode == "mean":
            padding = -1 if self.module.padding_idx is None else self.module.padding_idx
            is_entry = (indices != padding).to(gradient.dtype)
            lengths = gradient.new_zeros(len(gradient)).index_add_(0, of_index, is_entry)
            gradients = gradients / lengths.clamp_min(1)[of_index, None]
        return super().uses(indices, gradients)
