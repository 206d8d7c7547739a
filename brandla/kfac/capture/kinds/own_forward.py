"""Forward passes that take the place of a module's own while it is watched, with the products inside in sight."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Self

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import Kind, Record


class OwnForward:
    """Takes the place of the forward pass of one module while anything is attached to it."""

    # Whether calls inside graphs of torch.compile are watched too.
    compiles = False
    # What a call runs, with the module as its first argument, if anybody wants to know of it.
    in_sight: Callable[..., Any]

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        # By part: who is told of its uses, by what, and a function that says whether that is wanted now.
        self.attached: dict[str, list[tuple[ForwardKind, Record, Callable[[], bool]]]] = {}

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """Return the one that a module has, or a new one; None where the module's forward pass is somebody else's."""
        own = vars(module).get("forward")
        known = getattr(own, "__self__", None)
        if own is None:
            return cls(module)
        return known if isinstance(known, cls) and known.module is module else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Have copies of the module, and what is loaded from a file, compute the same and record nothing."""
        return type(self), (self.module,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's."""
        is_hidden = torch.compiler.is_compiling() and not self.compiles
        is_watched = not is_hidden and any(self.is_watched(part) for part in self.attached)
        run = self.in_sight if is_watched else type(self.module).forward
        return run(self.module, *args, **kwargs)

    def is_watched(self, part: str) -> bool:
        """Say whether anybody wants the calls of a weight now."""
        return any(is_wanted() for _, _, is_wanted in self.attached.get(part, ()))

    def recorded(self, part: str, inputs: Tensor, output: Tensor, valid: Tensor | None = None) -> Tensor:
        """Report one use of a weight, of positions some of which may be padding; return its output to go on with."""
        for kind, record, _ in self.attached.get(part, ()):
            output = record(kind if valid is None else kind.knowing(valid=valid), inputs, output)
        return output


def finding(function: Any, **names: Any) -> FunctionType:
    """Return a function of torch's that finds others than its own by these names of its module."""
    # Without a name of its own it is no part of that module to the compiler.
    found = {key: part for key, part in function.__globals__.items() if key != "__name__"} | names
    return FunctionType(function.__code__, found, None, function.__defaults__, function.__closure__)


class ForwardKind(Kind):
    """A weight whose uses are products that an `OwnForward` reports."""

    def __init__(
        self, forward: OwnForward, weight: str, bias: str, part: str = "", module: nn.Module | None = None
    ) -> None:
        super().__init__(forward.module if module is None else module, weight, bias)
        self.part = part or weight
        self._forward: Any = forward

    def attach(self, record: Record, is_wanted: Callable[[], bool]) -> list[Any]:
        """Have the forward pass call ``record``; the module's own attribute shadows that of its class."""
        self._forward.attached.setdefault(self.part, []).append((self, record, is_wanted))
        self._forward.module.forward = self._forward.forward
        return [self]

    def remove(self) -> None:
        """Report no more; the last one gives the module its forward pass back. A second time does nothing."""
        attached = self._forward.attached
        others = [own for own in attached[self.part] if own[0] is not self]
        if len(others) < len(attached[self.part]):
            attached[self.part] = others
            if not any(attached.values()):
                vars(self._forward.module).pop("forward", None)
