"""Mixed precision: the scale of the loss, and batches with values that are not finite, which count for nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from brandla._sharded import is_dtensor
from brandla.kfac.capture.layer import Layer
from brandla.kfac.values import Rows, by_kind, map_by_kind
from brandla_kernels import reads_are_free

# What tensors of one kernel have in common.
_kind = attrgetter("dtype", "device")
# Integers of so many bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """Return the scale, without reading it back; None where there is no scaler that is in use.

    Or raise, if the gradients of no optimizer have been unscaled since the last update of the scale.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    # No public attribute tells: a second unscale_ raises, and gradients keep their version.
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is not None and not any(state["found_inf_per_device"] for state in states.values()):
        message = (
            "KFAC.step: gradients must be divided by the scale of the loss first; call scaler.unscale_(optimizer)"
            " between loss.backward() and preconditioner.step()"
        )
        raise RuntimeError(message)
    # 1, as the scaler scales it.
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


@dataclass(frozen=True)
class Mask:
    """Whether all numbers of a step are finite, squares of rows included, and what the step becomes if not.

    Nothing waits for the device.
    """

    finite: Tensor
    known_finite: bool

    @classmethod
    def of(cls, rows: Iterable[Rows], model: nn.Module, but: Iterable[Tensor | None] = ()) -> Mask:
        """Look once at all rows, and at all gradients of the model ``but`` those that are products of rows."""
        left_out = {id(gradient) for gradient in but}
        # Of entries under such a bound N times the sum of the squares is finite.
        bounds = [
            (part, math.sqrt(torch.finfo(part.dtype).max / max(own.uses * part.numel(), 1)))
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

    def rows(self, own: Mapping[Layer, Rows]) -> dict[Layer, Rows]:
        """Return the rows, or zeros."""
        if self.known_finite:
            return dict(own)
        parts = {id(part): part for rows in own.values() for part in (rows.inputs, rows.gradients)}
        found = [part for part in parts.values() if part.is_floating_point()]
        masked = map_by_kind(found, _kind, lambda members: self._times(torch._foreach_mul, members))
        parts |= {id(part): new.view(part.dtype) for part, new in zip(found, masked, strict=True)}
        return {
            layer: Rows(parts[id(rows.inputs)], parts[id(rows.gradients)], *rows[2:]) for layer, rows in own.items()
        }

    def clear(self, model: nn.Module) -> None:
        """Make all gradients of the model 0 unless finite."""
        if self.known_finite:
            return
        plain: list[Tensor] = []
        for gradient in _gradients(model):
            is_whole = type(gradient) is Tensor or not is_dtensor(gradient)
            if is_whole and gradient.is_floating_point() and not gradient.is_neg():
                plain.append(gradient)
            else:
                gradient.masked_fill_(~self.finite.to(gradient.device), 0)
        for members in by_kind(plain, map(_kind, plain)):
            self._times(torch._foreach_mul_, members)

    @cached_property
    def one(self) -> Tensor:
        """1 if finite, else 0, in int32."""
        return self.finite.to(torch.int32)

    def _times(self, multiply: Callable[[list[Tensor], Tensor], Any], parts: Sequence[Tensor]) -> Any:
        """Multiply tensors of one kind by 1 or 0, in one kernel: as integers, since 0 times NaN is NaN."""
        integers = [part.view(_INTEGERS[part.dtype.itemsize]) for part in parts]
        return multiply(integers, self.one.to(integers[0].device, integers[0].dtype))


def _all_within(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Say whether all entries of each part are less than its bound in size."""
    within: list[Tensor] = []
    for members in by_kind(parts, map(_kind, [part for part, _ in parts])):
        own, bounds = [part for part, _ in members], [bound for _, bound in members]
        if reads_are_free(own[0]):
            # A norm of order infinity takes many times as long on a CPU. A NaN is the least and the greatest.
            extremes = [extreme for part in own for extreme in torch.aminmax(part)]
            bounds = [signed for bound in bounds for signed in (-bound, bound)]
        else:
            extremes = list(torch._foreach_norm(own, math.inf))
        # NaN, and infinity over an infinite bound, are not less than 1.
        within.append((torch.stack(torch._foreach_div(extremes, bounds)) < 1).all())
    return within[0] if len(within) == 1 else torch.stack([part.to(within[0].device) for part in within]).all()


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
