"""Options that may change while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import TypeAlias, TypeVar

Option = TypeVar("Option")
# A number, or a function of the step's number, from 0.
Schedule: TypeAlias = Option | Callable[[int], Option]


def at(schedule: Schedule[Option], step: int) -> Option:
    """Return the value of a schedule."""
    return schedule(step) if callable(schedule) else schedule


def spelled(option: object) -> str:
    """Spell an option as ``repr`` does, but functions by their qualified names: those are the same in every process."""
    if hasattr(option, "__qualname__"):
        return f"{option.__module__}.{option.__qualname__}"
    if is_dataclass(option) and not isinstance(option, type):
        options = ", ".join(f"{part.name}={spelled(getattr(option, part.name))}" for part in fields(option))
        return f"{type(option).__name__}({options})"
    return repr(option)
