"""Mixed precision: the scale of the loss, and the check that discards batches with non-finite values."""

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

# Tensors that share both can be passed to one kernel.
_dtype_and_device = attrgetter("dtype", "device")
# The integer dtype of each size in bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """Return the scale, without reading it back; None without an enabled scaler.

    Raises if no optimizer's gradients have been unscaled since the last update of the scale.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    # No public attribute shows this: a second unscale_ raises, and gradients keep their version.
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is not None and not any(state["found_inf_per_device"] for state in states.values()):
        message = (
            "KFAC.step: gradients must be divided by the scale of the loss first; call scaler.unscale_(optimizer)"
            " between loss.backward() and preconditioner.step()"
        )
        raise RuntimeError(message)
    return scaler.scale(torch.ones((), device=device))


@dataclass(frozen=True)
class FiniteCheck:
    """Whether all numbers of a step are finite, squares of rows included. It zeroes the step if they are not.

    Nothing waits for the device.
    """

    finite: Tensor
    known_finite: bool

    @classmethod
    def of(cls, rows: Iterable[Rows], model: nn.Module, products: Iterable[Tensor | None] = ()) -> FiniteCheck:
        """Look once at all rows, and at all gradients of the model except ``products`` of rows."""
        skipped = {id(gradient) for gradient in products}
        # If the entries are below this bound, N times the sum of their squares is finite.
        bounds = [
            (part, math.sqrt(torch.finfo(part.dtype).max / max(of_layer.uses * part.numel(), 1)))
            for of_layer in rows
            for part in (of_layer.inputs, of_layer.gradients)
            if part.is_floating_point()
        ]
        bounds += [(part, math.inf) for part in _gradients(model) if id(part) not in skipped]
        checked = [
            (torch.view_as_real(part.resolve_conj()) if part.is_complex() else part, bound)
            for part, bound in bounds
            if part.numel()
        ]
        if not checked:
            # One of several processes may have no data.
            return cls(torch.tensor(True, device=next(model.parameters()).device), known_finite=True)
        finite = _all_within(checked)
        return cls(finite, reads_are_free(finite) and bool(finite))

    def rows(self, by_layer: Mapping[Layer, Rows]) -> dict[Layer, Rows]:
        """Return the rows if all is finite, and zeros otherwise."""
        if self.known_finite:
            return dict(by_layer)
        parts = {id(part): part for rows in by_layer.values() for part in (rows.inputs, rows.gradients)}
        real = [part for part in parts.values() if part.is_floating_point()]
        masked = map_by_kind(real, _dtype_and_device, lambda members: self._multiplied(torch._foreach_mul, members))
        parts |= {id(part): new.view(part.dtype) for part, new in zip(real, masked, strict=True)}
        return {
            layer: Rows(parts[id(rows.inputs)], parts[id(rows.gradients)], *rows[2:])
            for layer, rows in by_layer.items()
        }

    def clear(self, model: nn.Module) -> None:
        """Zero all gradients of the model unless all is finite."""
        if self.known_finite:
            return
        plain: list[Tensor] = []
        for gradient in _gradients(model):
            is_whole = type(gradient) is Tensor or not is_dtensor(gradient)
            if is_whole and gradient.is_floating_point() and not gradient.is_neg():
                plain.append(gradient)
            else:
                gradient.masked_fill_(~self.finite.to(gradient.device), 0)
        for members in by_kind(plain, map(_dtype_and_device, plain)):
            self._multiplied(torch._foreach_mul_, members)

    @cached_property
    def finite_int(self) -> Tensor:
        """1 if all is finite, else 0, in int32."""
        return self.finite.to(torch.int32)

    def _multiplied(self, multiply: Callable[[list[Tensor], Tensor], Any], parts: Sequence[Tensor]) -> Any:
        """Multiply tensors of one dtype and device by 1 or 0, in one kernel. As integers, since 0 times NaN is NaN."""
        integers = [part.view(_INTEGERS[part.dtype.itemsize]) for part in parts]
        return multiply(integers, self.finite_int.to(integers[0].device, integers[0].dtype))


def _all_within(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Say whether all entries of each part are less than its bound in size."""
    within: list[Tensor] = []
    for members in by_kind(parts, map(_dtype_and_device, [part for part, _ in parts])):
        tensors, bounds = [part for part, _ in members], [bound for _, bound in members]
        if reads_are_free(tensors[0]):
            # On a CPU, a norm of order infinity takes many times as long. If there is a NaN, aminmax returns it twice.
            extremes = [extreme for part in tensors for extreme in torch.aminmax(part)]
            bounds = [signed for bound in bounds for signed in (-bound, bound)]
        else:
            extremes = list(torch._foreach_norm(tensors, math.inf))
        # NaN, and infinity over an infinite bound, are not less than 1.
        within.append((torch.stack(torch._foreach_div(extremes, bounds)) < 1).all())
    return within[0] if len(within) == 1 else torch.stack([part.to(within[0].device) for part in within]).all()


def _gradients(model: nn.Module) -> list[Tensor]:
    """Return all gradients, and the values of sparse ones. The generators of ``model.parameters()`` take far longer."""
    modules, known = [model], {model}
    gradients: dict[int, Tensor] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.grad is not None:
                gradients[id(parameter)] = parameter.grad
        for child in module._modules.values():
            if child is not None and child not in known:
                known.add(child)
                modules.append(child)
    return [gradient._values() if gradient.is_sparse else gradient for gradient in gradients.values()]
