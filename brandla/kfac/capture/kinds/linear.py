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
    can_leave_out = True
    either_order = True

    @classmethod
    def why_left(cls, module: Any) -> str:
        is_in_attention = isinstance(module, NonDynamicallyQuantizableLinear)
        return "the attention that holds it never calls it" if is_in_attention else ""

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        return wrong_shape(output, (*inputs.shape[:-1], self.shape[1]))


class TransposedKind(LinearKind):
    """x weight + bias, as the ``Conv1D`` of transformers computes it."""

    can_leave_out = False
    transposed = True


class BilinearKind(Kind):
    """A Linear of the flattened x yᵀ: d_in is the product of both inputs' sizes."""

    types = (nn.Bilinear,)
    either_order = True

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
    """An embedding: d_in is the number of entries and d_out their size. Inputs are indices, −1 for padding.

    Positions are rows in every sharing, since an average of one-hot inputs would not be one-hot.
    """

    types: ClassVar[tuple[type[Any], ...]] = (nn.Embedding,)
    one_hot = True
    either_order = True
    transposed = True

    @classmethod
    def why_left(cls, module: Any) -> str:
        if module.sparse:
            return "its gradient is sparse"
        return "its gradient is scaled by frequency" if module.scale_grad_by_freq else ""

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        return wrong_shape(output, (*inputs.shape, self.weight.shape[1]))

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return indices and their gradients; padding, which autograd ignores too, has −1 and 0."""
        samples = inputs.shape[0] if inputs.ndim else 1
        indices = inputs.reshape(samples, -1)
        gradients = gradient.reshape(*indices.shape, gradient.shape[-1])
        if self.module.padding_idx is not None:
            padding = indices == self.module.padding_idx
            indices = torch.where(padding, -1, indices)
            gradients = torch.where(padding[..., None], 0, gradients)
        return Uses(indices[..., None], gradients)


class TiedEmbeddingKind(EmbeddingKind):
    """An embedding tied to a Linear: it uses Wᵀ, and its rows are those of the Linear's matrix W (entries, size).

    The one-hot row takes the place of the output gradient, and the gradient of the entry the place of the input. The
    bias has no part in it.
    """

    one_hot = False
    transposed = False
    uses_transpose = True

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return the gradients of entries, and dense one-hot rows; both are 0 for padding."""
        indices, gradients, _ = super().uses(inputs, gradient)
        one_hot = gradients.new_zeros(*gradients.shape[:-1], self.shape[1])
        one_hot.scatter_(-1, indices.clamp_min(0), (indices >= 0).to(one_hot.dtype))
        return Uses(gradients, one_hot, gradients.new_zeros(*gradients.shape[:-1], 1))


class BagKind(EmbeddingKind):
    """An embedding that adds up bags: an entry has the gradient of its bag, in a mean divided by the bag's length."""

    types: ClassVar[tuple[type[Any], ...]] = (nn.EmbeddingBag,)
    # The second dimension of the inputs holds the entries of a bag, not positions.
    either_order = False
    _offsets: Tensor | None = None

    @classmethod
    def why_left(cls, module: Any) -> str:
        return super().why_left(module) or ("its gradient is that of a maximum" if module.mode == "max" else "")

    def of_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kind, Any]:
        """Return a kind with the offsets of the bags, and the indices: if weighted, a string that `refusal` refuses."""
        given = {**dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)), **kwargs}
        inputs = given["input"] if given.get("per_sample_weights") is None else "weighted indices"
        return self.copy_with(_offsets=given.get("offsets")), inputs

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        return ""  # the module has checked its indices

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return one sample for each index; padding has −1 and 0."""
        indices = inputs.flatten()
        if self._offsets is None:
            bags = torch.arange(len(inputs), device=inputs.device).repeat_interleave(inputs.shape[1])
        else:
            places = torch.arange(len(indices), device=inputs.device, dtype=self._offsets.dtype)
            bags = torch.searchsorted(self._offsets, places, right=True) - 1
        gradients = gradient[bags]
        if self.module.mode == "mean":
            padding = -1 if self.module.padding_idx is None else self.module.padding_idx
            is_entry = (indices != padding).to(gradient.dtype)
            lengths = gradient.new_zeros(len(gradient)).index_add_(0, bags, is_entry)
            gradients = gradients / lengths.clamp_min(1)[bags, None]
        return super().uses(indices, gradients)
