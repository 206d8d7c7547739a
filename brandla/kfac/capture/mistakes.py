"""What a training loop seems to get wrong, and what became of layers: told once, and nothing waits for the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import OwnHook
from brandla.kfac.capture.layer import Layer
from brandla.kfac.systems.strategy import Curvature
from brandla_kernels import reads_are_free

# The step at which gradients are compared with what was captured, for the only time.
CHECKED_AT = 10
# Steps without a gradient, one after the other, that are told.
_MOST_EMPTY = 3
# Steps between two copies of the number of skipped batches.
_COPIED_EVERY = 32

_NOT_FINITE = (
    "a batch was skipped, since a value that was captured, or a gradient, is not finite; all that follow are skipped"
    " without a word, and report().skipped counts them"
)
# Layers that a warning names; the report has all.
_MOST_NAMED = 2
_UNSEEN = (
    "layers have a gradient, and none of the calls that made it was seen: their gradients are left as they are. Weights"
    " read by functional calls are not seen, nor are outputs that enter the loss by their derivatives alone (PINN,"
    " Sobolev), nor a model that ran under torch.compile before KFAC was constructed (call torch.compiler.reset() after"
    " that)"
)


class Mistakes:
    """Warnings about the training loop and the layers, each given once."""

    def __init__(self) -> None:
        # Messages, and layers and sides that were named, by what they were named for.
        self._told: set[str | tuple[str, str]] = set()
        # Curvatures whose factors have been looked at.
        self._begun: dict[Layer, Curvature] = {}
        self._empty = 0
        # What the numbers are about, the numbers on the host, and an event that tells when they are there.
        self._coming: list[tuple[Sequence[Layer], Tensor, Any]] = []

    def look_at_model(self, model: nn.Module) -> None:
        """Tell of hooks that another preconditioner has left."""
        hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
        if any(isinstance(hook, OwnHook) for hook in hooks):
            message = (
                "the model has hooks of another KFAC, which goes on capturing, and the step would be preconditioned"
                " twice: call its remove() first"
            )
            self._tell(message, outside=4)

    def look_before(self, layers: Sequence[Layer], *, alone: bool) -> None:
        """Tell of steps with nothing to do, and of those that come too late."""
        self._empty = 0 if layers or not alone else self._empty + 1
        if self._empty == _MOST_EMPTY:
            self._tell(
                f"step() found no gradient {_MOST_EMPTY} times in a row: call it after loss.backward(), before"
                " zero_grad() and optimizer.step()"
            )
        if alone and [layer for layer in layers if layer.capture.is_overtaken()]:
            self._tell(
                "weights were written to between the backward pass and step(): call preconditioner.step() before"
                " optimizer.step(), which else takes the plain gradient"
            )

    def look_at_rows(self, layers: Iterable[Layer], scale: Tensor | None) -> None:
        """Compare the rows of Linear layers with their gradients, as far as both are there."""
        found = {layer: numbers for layer in layers if (numbers := layer.comparison(scale)) is not None}
        if found:
            device = next(iter(found.values())).device
            self._send(list(found), torch.stack([numbers.to(device, torch.float32) for numbers in found.values()]))

    def look_at_skipped(self, looked_at: Tensor, finite: Tensor, step: int) -> None:
        """Have a warning said where not all steps were finite; now and then, where a copy has to be made."""
        if _NOT_FINITE not in self._told and (reads_are_free(finite) or step % _COPIED_EVERY == 0):
            self._send((), looked_at - finite)

    def tell_what_came(self) -> None:
        """Say what has come to the host by now."""
        while self._coming and ((event := self._coming[0][2]) is None or event.query()):
            layers, numbers, _ = self._coming.pop(0)
            if layers:
                for message in _judged(layers, numbers.tolist()):
                    self._tell(message)
            elif numbers > 0:
                self._tell(_NOT_FINITE)

    def tell_of_layers(self, layers: Sequence[Layer], unseen: Iterable[Layer]) -> None:
        """Say which layers turned out not to work, which factors got a substitute, and which layers have no data."""
        begun = [layer for layer in layers if self._begun.get(layer) is not layer.curvature and layer.curvature.started]
        self._begun |= {layer: layer.curvature for layer in begun}
        factors = [(layer, side, factor) for layer in begun for side, factor in layer.curvature.factors()]
        topics = {
            "layers are left to the optimizer from now on": {
                layer.name: layer.capture.refusal for layer in layers if layer.capture.refusal
            },
            "some factors are too small for the strategy and got another, see report()": {
                f"{layer.name} ({side})": factor.reason for layer, side, factor in factors if factor.reason
            },
            _UNSEEN: {layer.name: "" for layer in unseen if not layer.capture.refusal},
        }
        for what, about in topics.items():
            new = [name for name in about if (what, name) not in self._told]
            if new:
                self._told |= {(what, name) for name in new}
                told = [f"{name}: {about[name]}" if about[name] else name for name in new]
                more = f"; and {len(told) - _MOST_NAMED} more, see report()" if len(told) > _MOST_NAMED else ""
                self._tell(f"{what}: {'; '.join(told[:_MOST_NAMED])}{more}")

    def _send(self, layers: Sequence[Layer], numbers: Tensor) -> None:
        """Have numbers brought to the host; from devices that cannot do so without a wait, nothing is."""
        if numbers.device.type == "cpu":
            self._coming.append((layers, numbers, None))
        elif numbers.device.type == "cuda":
            copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(numbers.device))
            self._coming.append((layers, copy, event))

    def _tell(self, message: str, outside: int = 7) -> None:
        """Warn at the user's line: past this class, and the step with the three decorators around it."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(f"KFAC: {message}", stacklevel=outside)


def _judged(layers: Sequence[Layer], numbers: Sequence[Sequence[float]]) -> Iterator[str]:
    """Say what comparisons mean: ‖P Qᵀ‖², ⟨P Qᵀ, ∂W⟩, ‖∂W‖², and the mean of |g|² over the N uses, by layer."""
    missing, multiples = [], []
    for layer, (squared, product, gradient, _, _) in zip(layers, numbers, strict=True):
        if not math.isfinite(squared) or squared - 2 * product + gradient <= 0.01 * gradient:
            continue
        if product > 0 and squared * gradient - product**2 < 1e-4 * squared * gradient:
            multiples.append(product / gradient)
        else:
            missing.append(layer.name)
    if multiples:
        yield (
            f"what was captured is {multiples[-1]:.4g} times the gradient: give the GradScaler to KFAC(scaler=...), or"
            " multiply the loss, not the gradients"
        )
    if missing:
        yield (
            f"the calls that were seen make only part of the gradient of {', '.join(missing)}: a loss that has"
            " derivatives of the model in it (PINN, Sobolev), a penalty, or weights that are read by functional calls"
            " add the rest, of which the factors know nothing"
        )
    # The last layer is the nearest to the loss.
    _, _, _, mean, uses = numbers[-1]
    if not multiples and math.isfinite(mean) and mean > 16 * uses:
        yield (
            f"the gradients of single terms, N γ for a mean over N, have an RMS length of {mean**0.5:.2g} at"
            f" {layers[-1].name}: if the loss is a sum, divide it by the number of its terms, and if a GradScaler"
            " multiplies it, give that to KFAC(scaler=...)"
        )
