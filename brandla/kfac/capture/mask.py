"""Batches with values that are not finite: they count for nothing, and nothing waits for the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from brandla.kfac.values import Rows
from brandla_kernels import reads_are_free


class Mask(NamedTuple):
    """Whether all numbers of a step are finite, squares of rows included, and what the step becomes if not."""

    finite: Tensor
    known_finite: bool

    @classmethod
    def of(cls, rows: Iterable[Rows], model: nn.Module, but: Iterable[Tensor | None] = ()) -> Mask:
        """Look once at all rows, and at all gradients of the model ``but`` those that are products of rows."""
        left_out = {id(gradient) for gradient in but}
        bounds = [
            (part, _bound(part, own.uses))
            for own in rows
            for part in (own.inputs, own.gradients)
            if part.is_floating_point()
        ]
        bounds += [(part, math.inf) for part in _gradients(model) if id(part) not in left_out]
        found = [
            (torch.view_as_real(part.resolve_conj()) if part.is_complex() else part, bound)
            for part, bound in bounds
            if part.numel()
        ]
        if not found:
            # One of several processes may have nothing.
            return cls(torch.tensor(True, device=next(model.parameters()).device), known_finite=True)
        finite = _all_within(found)
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
            gradients = _gradients(model)
            empty = {device: ~self.finite.to(device) for device in {gradient.device for gradient in gradients}}
            for gradient in gradients:
                gradient.masked_fill_(empty[gradient.device], 0)

    def _or_zero(self, part: Tensor) -> Tensor:
        return torch.where(self.finite.to(part.device), part, 0)


def _bound(part: Tensor, uses: int) -> float:
    """Return the bound of entries under which ``uses`` times the sum of their squares is finite."""
    return math.sqrt(torch.finfo(part.dtype).max / max(uses * part.numel(), 1))


def _all_within(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Say whether all entries of each part are less than its bound in size."""
    # A NaN is the least and the greatest; a norm of order infinity takes many times as long on a CPU.
    extremes = [extreme for part, _ in parts for extreme in torch.aminmax(part)]
    # What is not finite gives NaN where the bound is infinite.
    relative = list(torch._foreach_div(extremes, [bound for _, bound in parts for _ in range(2)]))
    if len({(extreme.dtype, extreme.device) for extreme in relative}) > 1:
        widest = reduce(torch.promote_types, {extreme.dtype for extreme in relative})
        relative = [extreme.to(relative[0].device, widest) for extreme in relative]
    within: Tensor = torch.stack(relative).abs() < 1
    return within.all()


def _gradients(model: nn.Module) -> list[Tensor]:
    """Return all gradients; of a sparse one, its values. The generators of ``model.parameters()`` take far longer."""
    modules, known = [model], {model}
    found: dict[int, Tensor] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.grad is not None:
                found[id(parameter)] = parameter.grad
        for child in module._modules.values():
            if child is not None and child not in known:
                known.add(child)
                modules.append(child)
    return [gradient._values() if gradient.is_sparse else gradient for gradient in found.values()]
