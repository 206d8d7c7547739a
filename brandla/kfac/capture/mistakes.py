"""Warnings about mistakes of a training loop and about layers. Each is given once, and none waits for the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import BoundHook
from brandla.kfac.capture.layer import Layer
from brandla.kfac.systems.strategy import Curvature
from brandla_kernels import reads_are_free

# The only step at which gradients are compared with the captured rows.
GRADIENTS_CHECKED_AT = 10
# The number of consecutive steps without a gradient after which there is a warning.
_MOST_EMPTY = 3
# Steps between two copies of the number of skipped batches.
_COPIED_EVERY = 32

_NOT_FINITE = (
    "a batch was skipped, since a captured value or a gradient is not finite; later ones are skipped without a warning,"
    " and report().skipped counts them"
)
# A warning names this many layers; the report has all.
_MOST_NAMED = 2
_UNSEEN = (
    "layers have a gradient, but no call that made it was captured: their gradients are left as they are. KFAC captures"
    " no functional calls, no outputs that enter the loss by their derivatives alone (PINN, Sobolev), and no model that"
    " ran under torch.compile before KFAC was constructed (then call torch.compiler.reset() after the construction)"
)


class Mistakes:
    """Warnings about the training loop and the layers, each given once."""

    def __init__(self) -> None:
        # Messages, and pairs of a topic and a layer or factor that a warning has named or counted.
        self._warned_of: set[str | tuple[str, str]] = set()
        # Curvatures whose factors have been looked at.
        self._started: dict[Layer, Curvature] = {}
        self._empty = 0
        # Layers, their numbers on the host, and an event that is done once the numbers have arrived.
        self._pending: list[tuple[Sequence[Layer], Tensor, Any]] = []

    def check_model(self, model: nn.Module) -> None:
        """Warn of hooks that another preconditioner has left."""
        hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
        if any(isinstance(hook, BoundHook) for hook in hooks):
            self._warn(
                "the model has hooks of another KFAC, which goes on capturing, and steps would be preconditioned twice:"
                " call its remove() first",
                stacklevel=4,
            )

    def check_loop(self, layers: Sequence[Layer], *, alone: bool) -> None:
        """Warn of steps that find no gradient, and of steps that come too late."""
        self._empty = 0 if layers or not alone else self._empty + 1
        if self._empty == _MOST_EMPTY:
            self._warn(
                f"step() found no gradient {_MOST_EMPTY} times in a row: call it after loss.backward(), before"
                " zero_grad() and optimizer.step()"
            )
        if alone and [layer for layer in layers if layer.capture.is_weight_changed()]:
            self._warn(
                "weights were written to between the backward pass and step(): call preconditioner.step() before"
                " optimizer.step(), which otherwise takes the plain gradient"
            )

    def check_gradients(self, layers: Iterable[Layer], scale: Tensor | None) -> None:
        """Compare the rows of Linear layers with their gradients, for layers that have both."""
        found = {layer: numbers for layer in layers if (numbers := layer.comparison(scale)) is not None}
        if found:
            device = next(iter(found.values())).device
            table = torch.stack([numbers.to(device, torch.float32) for numbers in found.values()])
            self._copy_to_host(list(found), table)

    def check_skipped(self, looked_at: Tensor, finite: Tensor, step: int) -> None:
        """Check whether all steps were finite; only now and then, if this takes a copy to the host."""
        if _NOT_FINITE not in self._warned_of and (reads_are_free(finite) or step % _COPIED_EVERY == 0):
            self._copy_to_host((), looked_at - finite)

    def warn_of_checks(self) -> None:
        """Warn of the checks whose numbers have arrived on the host."""
        while self._pending and ((event := self._pending[0][2]) is None or event.query()):
            layers, numbers, _ = self._pending.pop(0)
            if layers:
                for message in _messages(layers, numbers.tolist()):
                    self._warn(message)
            elif numbers > 0:
                self._warn(_NOT_FINITE)

    def warn_of_layers(self, layers: Sequence[Layer], unseen: Iterable[Layer]) -> None:
        """Warn of layers that cannot be captured, of factors that got a substitute, and of layers without data."""
        new = [layer for layer in layers if self._started.get(layer) is not layer.curvature and layer.curvature.started]
        self._started |= {layer: layer.curvature for layer in new}
        factors = [(layer, side, factor) for layer in new for side, factor in layer.curvature.factors()]
        topics = {
            "layers are left to the optimizer from now on": {
                layer.name: layer.capture.refusal for layer in layers if layer.capture.refusal
            },
            "some factors are too small for the strategy and got another, see report()": {
                f"{layer.name} ({side})": factor.reason for layer, side, factor in factors if factor.reason
            },
            _UNSEEN: {layer.name: "" for layer in unseen if not layer.capture.refusal},
        }
        for topic, reasons in topics.items():
            names = [name for name in reasons if (topic, name) not in self._warned_of]
            if names:
                self._warned_of |= {(topic, name) for name in names}
                entries = [f"{name}: {reasons[name]}" if reasons[name] else name for name in names]
                more = f"; and {len(entries) - _MOST_NAMED} more, see report()" if len(entries) > _MOST_NAMED else ""
                self._warn(f"{topic}: {'; '.join(entries[:_MOST_NAMED])}{more}")

    def _copy_to_host(self, layers: Sequence[Layer], numbers: Tensor) -> None:
        """Start a copy of numbers to the host; nothing is copied from devices for which the host would have to wait."""
        if numbers.device.type == "cpu":
            self._pending.append((layers, numbers, None))
        elif numbers.device.type == "cuda":
            copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(numbers.device))
            self._pending.append((layers, copy, event))

    def _warn(self, message: str, stacklevel: int = 7) -> None:
        """Warn at the user's line, past the frames of this class and of the step with its three decorators."""
        if message not in self._warned_of:
            self._warned_of.add(message)
            warnings.warn(f"KFAC: {message}", stacklevel=stacklevel)


def _messages(layers: Sequence[Layer], numbers: Sequence[Sequence[float]]) -> Iterator[str]:
    """Yield warnings from the ‖P Qᵀ‖², ⟨P Qᵀ, ∂W⟩, ‖∂W‖², mean of |g|² over the uses, and N of each layer."""
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
            f"the product of the captured rows is {multiples[-1]:.4g} times the gradient: give the GradScaler to"
            " KFAC(scaler=...), or multiply the loss, not the gradients"
        )
    if missing:
        yield (
            f"the captured calls make only part of the gradient of {', '.join(missing)}: the factors miss the rest. It"
            " comes from derivatives of the model in the loss (PINN, Sobolev), a penalty, or weights that functional"
            " calls read"
        )
    # The last layer is the nearest to the loss.
    _, _, _, mean, uses = numbers[-1]
    if not multiples and math.isfinite(mean) and mean > 16 * uses:
        yield (
            f"the gradients of single terms, N γ for a mean over N, have an RMS length of {mean**0.5:.2g} at"
            f" {layers[-1].name}: if the loss is a sum, divide it by the number of its terms; if a GradScaler"
            " multiplies it, give the scaler to KFAC(scaler=...)"
        )
