"""``nn.Linear``, with any dimensions between samples and features, and ``nn.Bilinear``."""

from __future__ import annotations

from typing import Any

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
