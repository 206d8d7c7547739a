"""What all values share: they print in one line, are saved and loaded, move, and refuse the arithmetic of tuples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import wraps
from operator import methodcaller
from typing import Any, ClassVar, NoReturn, Self, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from brandla import _check
from brandla._sharded import here
from brandla_kernels import has_values


class Value:
    """What is beside the NamedTuple of its parts, all of one dtype and device, in the bases of every value.

    A value says what it is in ``_facts()``, and in ``_remedy`` what to call in place of a sum or a multiple.
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
        """Dtype of the parts; what a `Centred` value sums is float64 beside them."""
        return cast(torch.dtype, self[0].dtype)

    @property
    def device(self: Any) -> torch.device:
        """Device of the parts."""
        return cast(torch.device, self[0].device)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the value on another device or in another dtype, float32 or float64: arguments as in `Tensor.to`."""
        own: Any = self
        moved = {name: part.to(*args, **kwargs) for name, part in zip(own._fields, own, strict=True)}
        for name, part in moved.items():
            _check.part_dtype(f"{type(self).__name__}.to", name, getattr(part, "dtype", None))
        return type(self)(**moved)

    def __repr__(self: Any) -> str:
        # pytrees and torch.func put other things than tensors into these tuples.
        if all(isinstance(part, (Tensor, Value)) for part in self):
            with suppress(IndexError):  # of tensors that are no matrix
                return f"{type(self).__name__}({', '.join(self._facts())})"
        return super().__repr__()

    def _refuse(self, other: object) -> NoReturn:
        rule = "+ and * are not defined between its matrix and others"
        _check.fail_type(type(self).__name__, f"{rule}; got {type(other).__name__} beside it; {self._remedy}")

    __add__ = __radd__ = __mul__ = __rmul__ = _refuse


def _make_loadable(parts: Any) -> None:
    """Let a NamedTuple be built from one generator as well, as Optimizer.load_state_dict builds every container."""
    new, count = parts.__new__, len(parts._fields)

    @wraps(new)
    def construct(cls: type[Any], *given: Any, **named: Any) -> Any:
        if len(given) == 1 and isinstance(given[0], Iterator):
            given = _loaded(cls, tuple(given[0]))
        return new(cls, *given, **named) if named or len(given) != count else tuple.__new__(cls, given)

    parts.__new__ = construct


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


def _hold(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    held = tree_map_only(Value, _Held, state_dict["state"], is_leaf=lambda part: isinstance(part, Value))
    return state_dict | {"state": held}


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
