"""What a user should know of a preconditioner, each said once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from brandla.kfac.layer import Layer

_REFUSED = "layers are left to the optimizer from now on"
_REPLACED = "some factors are too small for the strategy and got another, see report()"
_UNSEEN = (
    "layers have a gradient, and none of the calls that made it was seen: their gradients are left as they are. Weights"
    " read by functional calls are not seen, nor is a model that ran under torch.compile before KFAC was constructed"
    " (call torch.compiler.reset() after that)"
)


class Notices:
    """Remembers what it has said."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def tell(self, layers: Iterable[Layer], unseen: Iterable[Layer]) -> None:
        """Warn of layers that turned out not to work, of substitutes, and of layers without data."""
        layers = list(layers)
        self._say(_REFUSED, {layer.name: layer.refusal for layer in layers if layer.refusal})
        factors = [(layer, side, factor) for layer in layers for side, factor in layer.curvature.factors()]
        self._say(
            _REPLACED, {f"{layer.name} ({side})": factor.reason for layer, side, factor in factors if factor.reason}
        )
        self._say(_UNSEEN, {layer.name: "" for layer in unseen if not layer.refusal})

    def _say(self, what: str, about: dict[str, str]) -> None:
        new = {name: reason for name, reason in about.items() if (what, name) not in self._said}
        self._said.update((what, name) for name in new)
        if new:
            of_each = "; ".join(f"{name}: {reason}" if reason else name for name, reason in new.items())
            # Past this class, step() and the two decorators around it.
            warnings.warn(f"KFAC: {what}: {of_each}", stacklevel=6)
