"""Batches with values that are not finite: they count for nothing, and no device is waited for to know."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from brandla.kfac.strategy import Rows
from brandla_kernels import reads_are_free


class Mask(NamedTuple):
    """Whether everything of a step is finite, squares of rows included, and what becomes of it if not."""

    finite: Tensor
    known_finite: bool

    @classmethod
    def of(cls, rows: Iterable[Rows], model: nn.Module) -> Mask:
        """Look once at all rows, which are squared, and all gradients of the model."""
        rows = list(rows)
        squares = min((_largest_squares(part, own.uses) for own in rows for part in _parts([own])), default=math.inf)
        found = [_all_within(_parts(rows), math.sqrt(squares)), _all_within(_gradients(model), math.inf)]
        looked_at = [finite for finite in found if finite is not None]
        if not looked_at:
            # One of several processes may have nothing.
            return cls(torch.tensor(True, device=next(model.parameters()).device), known_finite=True)
        finite = torch.stack([finite.to(looked_at[0].device) for finite in looked_at]).all()
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


def _largest_squares(part: Tensor, uses: int) -> float:
    """Return what the squares of all entries stay under where ``uses`` times their sum is finite."""
    return torch.finfo(part.dtype).max / max(uses * part.numel(), 1)


def _all_within(parts: Iterable[Tensor], bound: float) -> Tensor | None:
    """Say whether all entries are less than the bound in size; None where there is no entry."""
    # A NaN is the least and the greatest; a norm of order infinity takes many times as long on a CPU.
    extremes = [extreme for part in parts if part.numel() for extreme in torch.aminmax(_real(part))]
    if not extremes:
        return None
    widest = reduce(torch.promote_types, {extreme.dtype for extreme in extremes})
    within: Tensor = torch.stack([extreme.to(extremes[0].device, widest) for extreme in extremes]).abs() < bound
    return within.all()


def _real(part: Tensor) -> Tensor:
    return torch.view_as_real(part.resolve_conj()) if part.is_complex() else part


def _gradients(model: nn.Module) -> Iterable[Tensor]:
    """Go through all gradients; of a sparse one, through its values."""
    gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    return (gradient._values() if gradient.is_sparse else gradient for gradient in gradients)
