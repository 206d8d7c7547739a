"""Forward passes that take the place of a module's own while it is watched, with the products inside in sight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import Kind, Record


class OwnForward(ABC):
    """Takes the place of the forward pass of one module while anything is attached to it."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self._records: dict[str, list[tuple[Any, Record]]] = {}

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

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's."""

    def attach(self, kind: Kind, record: Record) -> Attachment:
        """Have ``record`` called at each use of the kind's weight."""
        self._records.setdefault(kind.part, []).append((kind, record))
        # The module's own attribute shadows that of its class.
        self.module.forward = self.forward
        return Attachment(self, kind.part, (kind, record))

    def detach(self, part: str, entry: tuple[Kind, Record]) -> None:
        """Undo one attachment; the last one gives the module its forward pass back."""
        self._records[part].remove(entry)
        if not any(self._records.values()):
            vars(self.module).pop("forward", None)

    def is_watched(self, part: str) -> bool:
        """Say whether anybody wants the calls of a weight now."""
        return any(record.is_wanted for _, record in self._records.get(part, ()))

    def recorded(self, part: str, inputs: Tensor, output: Tensor, valid: Tensor | None = None) -> Tensor:
        """Report one use of a weight, of positions some of which may be padding; return its output to go on with."""
        for kind, record in self._records.get(part, ()):
            output = record(kind if valid is None else kind.with_padding(valid), inputs, output)
        return output


class Attachment:
    """What takes a record off again."""

    def __init__(self, forward: OwnForward, part: str, entry: tuple[Kind, Record]) -> None:
        self._undo: tuple[OwnForward, str, tuple[Kind, Record]] | None = (forward, part, entry)

    def remove(self) -> None:
        """Take it off; a second time does nothing."""
        if self._undo is not None:
            forward, part, entry = self._undo
            forward.detach(part, entry)
            self._undo = None
