"""The base class of all values: they print in one line, save and load, move, and refuse the arithmetic of tuples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial, wraps
from operator import methodcaller
from typing import Any, ClassVar, NoReturn, Self, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from brandla import _check
from brandla._sharded import local_tensor
from brandla_kernels import has_values


class Value:
    """A base of every value, beside the NamedTuple of its parts, which all have one dtype and device.

    ``_summary()`` describes a value in words. ``_remedy`` says which function to call in place of a sum or a multiple.
    """

    __slots__ = ()
    _remedy: ClassVar[str]

    def __init_subclass__(cls) -> None:
        for parts in cls.__bases__:
            if issubclass(parts, tuple):
                _make_loadable(parts)
                torch.serialization.add_safe_globals([cls])

    @property
    def dtype(self: Any) -> torch.dtype:
        """Dtype of the parts, except for the sums of a `Centred` value, which are float64."""
        return cast(torch.dtype, self[0].dtype)

    @property
    def device(self: Any) -> torch.device:
        """Device of the parts."""
        return cast(torch.device, self[0].device)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the value on another device or in another dtype, float32 or float64: arguments as in `Tensor.to`."""
        parts: Any = self
        moved = {name: part.to(*args, **kwargs) for name, part in zip(parts._fields, parts, strict=True)}
        for name, part in moved.items():
            _check.part_dtype(f"{type(self).__name__}.to", name, getattr(part, "dtype", None))
        return type(self)(**moved)

    def __repr__(self: Any) -> str:
        # Pytrees and torch.func also put objects other than tensors into these tuples.
        if all(isinstance(part, (Tensor, Value)) for part in self):
            with suppress(IndexError):  # from tensors with too few dimensions
                return f"{type(self).__name__}({', '.join(self._summary())})"
        return super().__repr__()

    def _refuse(self, other: object) -> NoReturn:
        rule, got = "+ and * are not defined for the matrix of this value", type(other).__name__
        _check.fail_type(type(self).__name__, f"{rule}; got {got} as the other operand; {self._remedy}")

    __add__ = __radd__ = __mul__ = __rmul__ = _refuse


def _make_loadable(parts: Any) -> None:
    """Let one generator build a NamedTuple too: Optimizer.load_state_dict builds every container from a generator."""
    new, count = parts.__new__, len(parts._fields)

    @wraps(new)
    def construct(cls: type[Any], *given: Any, **named: Any) -> Any:
        if len(given) == count and not named:
            return tuple.__new__(cls, given)
        if len(given) == 1 and isinstance(given[0], Iterator):
            given = tuple(given[0])
            for name, part in zip(cls._fields, given, strict=False):
                allowed = (torch.float64,) if name in _check.SUMS else (torch.float32, torch.float64)
                if isinstance(part, Tensor) and part.dtype not in allowed:
                    names = " or ".join(map(_check.spelled, allowed))
                    rule = f"{name} must be {names}; got {_check.spelled(part.dtype)}"
                    why = "Optimizer.load_state_dict casts to the dtype of the parameter"
                    _check.fail_type(cls.__name__, f"{rule}; {why}: call brandla.keep_dtype(optimizer) first")
        return new(cls, *given, **named)

    parts.__new__ = construct


def formatted(name: str, value: Tensor, dims: int = 0) -> list[str]:
    """Return a number, or the first and last entry of a vector, in words; [] for a batch or a tensor without values."""
    value = local_tensor(value)
    if value.ndim != dims or not value.numel() or not has_values(value):
        return []
    entries = value[[0, -1]] if dims else [value]
    return [f"{name} " + " … ".join(f"{entry.item():.3g}" for entry in entries)]


def keep_dtype(optimizer: torch.optim.Optimizer) -> None:
    """Make ``optimizer.load_state_dict`` keep the dtype of the values in its state.

    By default, it casts all state of a parameter to the parameter's dtype. A basis in bfloat16 is no longer
    orthonormal, and a float64 basis loses half its digits in float32. Call this function once, in the constructor of
    the optimizer. Values in its state, and in lists and dicts there, then only move to the parameter's device.

    Examples
    --------
    >>> import torch, brandla
    >>> weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    >>> first, second = (torch.optim.SGD([weight]) for _ in range(2))
    >>> first.state[weight]["factor"] = brandla.LowRankEigh.zeros(8, rank=2)
    >>> brandla.keep_dtype(second)
    >>> second.load_state_dict(first.state_dict())
    >>> second.state[weight]["factor"].dtype
    torch.float32
    """

    def hold(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = state_dict["state"]
        held = tree_map_only(Value, lambda value: _PendingMove(value.to), state, lambda part: isinstance(part, Value))
        return state_dict | {"state": held}

    def release(optimizer: torch.optim.Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            released = methodcaller("__call__", getattr(parameter, "device", None))
            optimizer.state[parameter] = tree_map_only(_PendingMove, released, state)

    optimizer.register_load_state_dict_pre_hook(hold)
    optimizer.register_load_state_dict_post_hook(release)


class _PendingMove(partial[Any]):
    """The ``to`` of a value that has yet to move. `Optimizer.load_state_dict` does not look into it."""
