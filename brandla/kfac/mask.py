"""Batches with values that are not finite: they count for nothing, and no device is waited for to know."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from brandla.kfac.strategy import Rows
from brandla_kernels import reads_are_free


class Mask(NamedTuple):
    """Whether everything of a step is finite, and what becomes of it if not."""

    finite: Tensor
    known_finite: bool

    @classmethod
    def of(cls, rows: Iterable[Rows], model: nn.Module) -> Mask:
        """Look once at all rows and all gradients of the model."""
        parts = (part for part in [*_parts(rows), *_gradients(model)] if part.numel())
        # A NaN is the least and the greatest; a norm of order infinity takes many times as long on a CPU.
        extremes = [extreme for part in parts for extreme in torch.aminmax(part)]
        widest = reduce(torch.promote_types, {extreme.dtype for extreme in extremes})
        finite = torch.stack([extreme.to(extremes[0].device, widest) for extreme in extremes]).isfinite().all()
        return cls(finite, reads_are_free(finite) and bool(finite))

    def agreed(self, finite: bool) -> Mask:
        """Return the mask of a step that several processes take together."""
        return Mask(torch.full_like(self.finite, finite), finite)

    def rows(self, rows: Rows) -> Rows:
        """Return the rows, or zeros."""
        if self.known_finite:
            return rows
        inputs = self._or_zero(rows.inputs) if rows.inputs.is_floating_point() else rows.inputs
        return rows._replace(inputs=inputs, gradients=self._or_zero(rows.gradients))

    def clear(self, model: nn.Module) -> None:
        """Make all gradients of the model 0 unless finite."""
        if not self.known_finite:
            for gradient in _gradients(model):
                gradient.masked_fill_(~self.finite.to(gradient.device), 0)

    def _or_zero(self, part: Tensor) -> Tensor:
        return torch.where(self.finite.to(part.device), part, 0)


def _parts(rows: Iterable[Rows]) -> Iterable[Tensor]:
    for inputs, gradients, *_ in rows:
        if inputs.is_floating_point():
            yield inputs
        yield gradients


def _gradients(model: nn.Module) -> Iterable[Tensor]:
    """Go through all gradients; of a sparse one, through its values."""
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    return (gradient._values() if gradient.is_sparse else gradient for gradient in gradients)
