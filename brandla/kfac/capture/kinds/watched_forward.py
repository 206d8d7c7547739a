"""Forward passes that replace a module's own while it is watched, and report the products inside."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Self

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import Kind, Record


class WatchedForward:
    """Replaces the forward pass of one module while anything is attached to it."""

    # Whether calls inside graphs of torch.compile are watched too.
    compiles = False
    # The forward pass that reports products; a call runs it, with the module first, while a part is watched.
    run_watched: Callable[..., Any]

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        # For each part: the kinds that watch it, with their record functions and whether they watch it now.
        self.attached: dict[str, list[tuple[ForwardKind, Record, Callable[[], bool]]]] = {}

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """Return the module's object of this class, or a new one; None if other code has replaced its forward pass."""
        forward = vars(module).get("forward")
        owner = getattr(forward, "__self__", None)
        if forward is None:
            return cls(module)
        return owner if isinstance(owner, cls) and owner.module is module else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Make copies and pickles of the module compute the same, and record nothing."""
        return type(self), (self.module,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the same as the module's forward pass, and report its products while they are watched."""
        is_hidden = torch.compiler.is_compiling() and not self.compiles
        is_watched = not is_hidden and any(self.is_watched(part) for part in self.attached)
        run = self.run_watched if is_watched else type(self.module).forward
        return run(self.module, *args, **kwargs)

    def is_watched(self, part: str) -> bool:
        """Say whether any kind watches this part now."""
        return any(is_wanted() for _, _, is_wanted in self.attached.get(part, ()))

    def recorded(self, part: str, inputs: Tensor, output: Tensor, valid: Tensor | None = None) -> Tensor:
        """Report one use of a weight, in which only ``valid`` positions count; return the output to continue with."""
        for kind, record, _ in self.attached.get(part, ()):
            output = record(kind if valid is None else kind.copy_with(valid=valid), inputs, output)
        return output


def with_globals(function: Any, **names: Any) -> FunctionType:
    """Return a copy of a torch function with some of its global names replaced."""
    # Without __name__, the compiler does not treat the copy as part of torch's module.
    globals_ = {key: part for key, part in function.__globals__.items() if key != "__name__"} | names
    return FunctionType(function.__code__, globals_, None, function.__defaults__, function.__closure__)


class ForwardKind(Kind):
    """A weight whose uses are products that a `WatchedForward` reports."""

    def __init__(
        self, forward: WatchedForward, weight: str, bias: str, part: str = "", module: nn.Module | None = None
    ) -> None:
        super().__init__(forward.module if module is None else module, weight, bias)
        self.part = part or weight
        self._forward: Any = forward

    def attach(self, record: Record, is_wanted: Callable[[], bool]) -> list[Any]:
        """Make the forward pass call ``record``. An attribute of the module shadows the method of its class."""
        self._forward.attached.setdefault(self.part, []).append((self, record, is_wanted))
        self._forward.module.forward = self._forward.forward
        return [self]

    def remove(self) -> None:
        """Stop reporting. The last kind restores the module's forward pass. A second call does nothing."""
        attached = self._forward.attached
        others = [entry for entry in attached[self.part] if entry[0] is not self]
        if len(others) < len(attached[self.part]):
            attached[self.part] = others
            if not any(attached.values()):
                vars(self._forward.module).pop("forward", None)
