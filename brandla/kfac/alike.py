"""Many small things of one shape computed together: a device is asked once for all, not once for each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def alike(
    items: Sequence[Item], kind_of: Callable[[Item], Hashable], of: Callable[[list[Item]], Sequence[Result]]
) -> list[Result]:
    """Return what ``of`` makes of all items of a kind, in the order of the items."""
    members: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(kind_of(item), []).append(index)
    results: dict[int, Result] = {}
    for indices in members.values():
        results |= dict(zip(indices, of([items[index] for index in indices]), strict=True))
    return [results[index] for index in range(len(items))]
