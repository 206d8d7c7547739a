"""``nn.Bilinear``: a Linear of the products of both inputs' entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import Kind, OwnHook, Record, Uses, by_sample


class BilinearKind(Kind):
    """A row is x yᵀ as a vector: d_in is the product of both inputs' sizes."""

    types = (nn.Bilinear,)
    may_lead = True

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """d_out and d_in."""
        d_out, first, second = self.weight.shape
        return (), d_out, first * second

    def attach(self, record: Record) -> list[Any]:
        """Have ``record`` called with both inputs in one tensor."""

        def call(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            pair = [*args, *(kwargs[name] for name in ("input1", "input2")[len(args) :])]
            return record(self, torch.cat([part.detach() for part in pair], -1), output)

        return [self.module.register_forward_hook(OwnHook(self.module, call), with_kwargs=True)]

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return samples, positions and products."""
        first, second = by_sample(inputs).split(self.weight.shape[1:], -1)
        return Uses((first[..., :, None] * second[..., None, :]).flatten(-2), by_sample(gradient))
