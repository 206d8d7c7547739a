"""How many calls reach torch's own operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Count(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def torch_calls(function: Callable[[], object]) -> int:
    """Call once, and count."""
    with _Count() as mode:
        function()
    return mode.count
