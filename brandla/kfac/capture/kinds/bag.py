"""``nn.EmbeddingBag`` of sums and means: each index of a bag is a row."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.embedding import EmbeddingKind
from brandla.kfac.capture.kinds.kind import OwnHook, Record, Uses


class BagKind(EmbeddingKind):
    """An embedding whose entries are added up: the gradient of each is that of its bag, over the length in a mean."""

    types: ClassVar[tuple[type[Any], ...]] = (nn.EmbeddingBag,)
    # What its inputs hold are entries of bags, and no positions.
    may_lead = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._offsets: Tensor | None = None

    @classmethod
    def left(cls, module: nn.Module) -> str:
        """Say so of a maximum too."""
        bag: Any = module
        return super().left(module) or ("its gradient is that of a maximum" if bag.mode == "max" else "")

    def attach(self, record: Record) -> list[Any]:
        """Have ``record`` called with a kind that knows where the bags begin; not where entries are weighted."""

        def call(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            names = ("input", "offsets", "per_sample_weights")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            kind = copy.copy(self)
            kind._offsets = given.get("offsets")
            inputs = given["input"] if given.get("per_sample_weights") is None else "weighted indices"
            return record(kind, inputs, output)

        return [self.module.register_forward_hook(OwnHook(self.module, call), with_kwargs=True)]

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        """Nothing can be wrong with indices that the module has taken."""
        return ""

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return one sample for each index; padding has −1 and 0."""
        bag: Any = self.module
        indices = inputs.flatten()
        if self._offsets is None:
            of_index = torch.arange(len(inputs), device=inputs.device).repeat_interleave(inputs.shape[1])
        else:
            places = torch.arange(len(indices), device=inputs.device, dtype=self._offsets.dtype)
            of_index = torch.searchsorted(self._offsets, places, right=True) - 1
        is_entry = torch.ones_like(indices, dtype=torch.bool)
        if bag.padding_idx is not None:
            is_entry = indices != bag.padding_idx
        gradients = gradient[of_index] * is_entry[:, None]
        if bag.mode == "mean":
            lengths = gradient.new_zeros(len(gradient)).index_add_(0, of_index, is_entry.to(gradient.dtype))
            gradients = gradients / lengths.clamp_min(1)[of_index, None]
        return Uses(torch.where(is_entry, indices, -1)[:, None, None], gradients[:, None])
