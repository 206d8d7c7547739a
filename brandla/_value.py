"""What all values share: they print in one line, are saved and loaded, move, and refuse the arithmetic of tuples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from operator import methodcaller
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from brandla import _check
from brandla._sharded import here
from brandla_kernels import has_values

Value = TypeVar("Value", bound=tuple[Any, ...])
VALUES: list[type[Any]] = []


def value(remedy: str) -> Callable[[type[Value]], type[Value]]:
    """Make a NamedTuple a value. It has ``shape``, ``dtype``, ``device`` and, for its repr, ``_facts()``.

    ``remedy`` says what to call in place of a sum or a multiple.
    """

    def decorate(kind: type[Value]) -> type[Value]:
        new: Any = kind.__new__
        plain = kind.__repr__
        count = len(cast(Any, kind)._fields)

        @wraps(new)
        def construct(cls: type[Value], *parts: Any, **named: Any) -> Value:
            # Optimizer.load_state_dict builds every container from one generator.
            if len(parts) == 1 and isinstance(parts[0], Iterator):
                parts = _loaded(cls, tuple(parts[0]))
            if named or len(parts) != count:
                made: Value = new(cls, *parts, **named)
                return made
            return tuple.__new__(cls, parts)

        def describe(self: Value) -> str:
            # pytrees and torch.func put other things than tensors into these tuples.
            if all(isinstance(part, (Tensor, *VALUES)) for part in self):
                with suppress(IndexError):  # of tensors that are no matrix
                    return f"{kind.__name__}({', '.join(cast(Any, self)._facts())})"
            return plain(self)

        def refuse(self: Value, other: object) -> NoReturn:
            rule = "+ and * are not defined between its matrix and others"
            _check.fail_type(kind.__name__, f"{rule}; got {type(other).__name__} beside it; {remedy}")

        members = {"__new__": construct, "__repr__": describe}
        members |= dict.fromkeys(("__add__", "__radd__", "__mul__", "__rmul__"), refuse)
        for name, member in members.items():
            setattr(kind, name, member)
        torch.serialization.add_safe_globals([kind])
        VALUES.append(kind)
        return kind

    return decorate


def moved(value: Value, *args: Any, **kwargs: Any) -> Value:
    """Return a value of tensors with ``part.to(...)`` in place of each part, in float32 or float64."""
    function = f"{type(value).__name__}.to"
    parts = {name: part.to(*args, **kwargs) for name, part in zip(cast(Any, value)._fields, value, strict=True)}
    for name, part in parts.items():
        _check.part_dtype(function, name, getattr(part, "dtype", None))
    return type(value)(**parts)


def facts(value: Any, *sizes: str) -> list[str]:
    """Return what the repr of a matrix says first: its batch shape, its sizes, its rank, dtype and device."""
    batch = [f"batch {tuple(value.shape[:-2])}"] if len(value.shape) > 2 else []
    named = [f"{name}={size}" for name, size in zip(sizes, value.shape[-2:], strict=False)]
    return [*batch, *named, f"rank={value.rank}", str(value.dtype).removeprefix("torch."), str(value.device)]


def extremes(name: str, values: Tensor) -> list[str]:
    """Return the first and the last of the values of a matrix in words; nothing of a batch, or where there is none."""
    values = here(values)
    if values.ndim != 1 or not values.numel() or not has_values(values):
        return []
    return [f"{name} {values[0].item():.3g} … {values[-1].item():.3g}"]


def number(name: str, value: Tensor) -> list[str]:
    """Return one number in words; nothing of a batch, or where there is none."""
    value = here(value)
    return [f"{name} {value.item():.3g}"] if value.ndim == 0 and has_values(value) else []


def keep_dtype(optimizer: torch.optim.Optimizer) -> None:
    """Let ``optimizer.load_state_dict`` leave the dtype of the values in its state as it is.

    By default, it casts all state of a parameter to the parameter's dtype. A basis in bfloat16 is no basis any more,
    and a float64 basis loses half its digits in float32. Call this once, in the constructor of the optimizer. The
    values in its state, and in lists and dicts there, are then only moved to the parameter's device.

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
    optimizer.register_load_state_dict_pre_hook(_hold)
    optimizer.register_load_state_dict_post_hook(_release)


class _Held:
    """What `Optimizer.load_state_dict` does not look into."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def on(self, device: torch.device | None) -> Any:
        return self.value.to(device)


def _is_value(part: object) -> bool:
    return isinstance(part, tuple(VALUES))


def _hold(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return state_dict | {"state": tree_map_only(_is_value, _Held, state_dict["state"], is_leaf=_is_value)}


def _release(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        released = methodcaller("on", getattr(parameter, "device", None))
        optimizer.state[parameter] = tree_map_only(_Held, released, state)


def _loaded(kind: type[Any], parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Check the dtypes of what an optimizer's state is rebuilt from."""
    for name, part in zip(kind._fields, parts, strict=False):
        if isinstance(part, Tensor) and part.dtype not in _check.dtypes_of(name):
            rule = f"{name} must be {' or '.join(map(_check.spelled, _check.dtypes_of(name)))}"
            remedy = "Optimizer.load_state_dict casts to the dtype of the parameter: call brandla.keep_dtype(optimizer)"
            _check.fail_type(kind.__name__, f"{rule}; got {_check.spelled(part.dtype)}; {remedy} first")
    return parts
