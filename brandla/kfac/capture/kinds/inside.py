"""Weights that a module multiplies by inside of its forward pass: routers, experts, matrices in code of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from brandla.kfac.capture.kinds.kind import Kind, is_leaf, why_left
from brandla.kfac.capture.kinds.like import random, random_parts, run
from brandla.kfac.capture.kinds.own_forward import ForwardKind, OwnForward

# mypy takes the properties for what they give.
_PROPERTIES: tuple[Any, ...] = (Tensor.T, Tensor.mT)
_TRANSPOSES: Any = {Tensor.t, torch.t, Tensor.transpose, torch.transpose, *(own.__get__ for own in _PROPERTIES)}
_GROUPED: Any = {getattr(nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)} - {None}
_PRODUCTS: Any = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm} | _GROUPED


class InsideKind(ForwardKind):
    """A weight of a module that uses it inside; of a parameter with several weights, the one at ``index``."""

    may_lead = True

    def __init__(
        self, forward: InsideForward, weight: str, bias: str = "", index: int | None = None, *, transposed: bool
    ) -> None:
        super().__init__(forward, weight, bias, "" if index is None else f"{weight}.{index}")
        self.pairs = index is None
        # Of experts a guess before the first call, which tells.
        self.transposed = transposed
        self.index = index

    @property
    def was_seen(self) -> bool:
        return self._weight in self._forward.seen


def used_inside(module: nn.Module) -> list[Kind] | str | None:
    """Return the weights of a module that holds experts, or that multiplies by its own matrices; None for others."""
    parts = {name: part for name, part in module._parameters.items() if part is not None}
    if type(module).__module__.startswith("torch.nn") or not is_leaf(module):
        return None
    names = [name for name, part in parts.items() if part.ndim > 1]
    forward = InsideForward.of(module)
    if not names or forward is None or why_left(module, *names):
        return None
    cubes = [name for name in names if parts[name].ndim == 3]
    if cubes:
        count = len(parts[cubes[0]])
        are_experts = all(len(part) == count and part.ndim <= 3 for part in parts.values())
        if not are_experts or any(min(parts[name].shape) < 2 for name in cubes):
            return None
        turned = bool(getattr(module, "is_transposed", False))
        return [InsideKind(forward, name, index=i, transposed=turned) for name in cubes for i in range(count)]
    uses = _uses(module, random_parts(module))
    kinds = [InsideKind(forward, use.name, use.bias, transposed=use.is_transposed) for use in uses]
    return [*kinds] if kinds else None


class InsideForward(OwnForward):
    """The forward pass of a module, watched for products with its parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # The parameters that were used so far.
        self.seen: set[str] = set()

    def in_sight(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Products({name: part for name, part in module._parameters.items() if part is not None}, self._used):
            return type(module).forward(module, *args, **kwargs)

    def _used(self, use: _Use, output: Tensor) -> Tensor:
        name, weight = use.name, use.weight
        if weight.ndim == 3 and use.place is None and use.offsets is None and output.ndim != 3:
            return output
        self.seen.add(name)
        if weight.ndim < 3 or use.place is not None:
            part = name if use.place is None else f"{name}.{use.place}"
            return self._told(part, use, use.inputs, output)
        if use.offsets is None:
            inputs, outputs, join = use.inputs.expand(*output.shape[:-1], -1).unbind(), output.unbind(), torch.stack
        else:
            ends = use.offsets.tolist()
            counts = [end - start for start, end in zip([0, *ends], [*ends, len(output)], strict=True)]
            inputs, outputs, join = use.inputs.split(counts), output.split(counts), torch.cat
        pieces = enumerate(zip(inputs, outputs, strict=True))
        return join([self._told(f"{name}.{index}", use, *piece) for index, piece in pieces])

    def _told(self, part: str, use: _Use, inputs: Tensor, output: Tensor) -> Tensor:
        for kind, _, _ in self.attached.get(part, ()):
            kind.transposed = use.is_transposed
        return self.recorded(part, inputs, output) if output.numel() else output


class _Use(NamedTuple):
    """A parameter as it is multiplied with: whole, one of several weights, and as x weight in place of x weightᵀ.

    Its ``tensor`` is kept, so that no other can get the identity of that. In a product ``offsets`` say where the rows
    of each of several weights end.
    """

    name: str
    weight: Tensor
    tensor: Tensor
    place: int | None = None
    is_transposed: bool = False
    inputs: Any = None
    bias: str = ""
    offsets: Tensor | None = None


class _Products(TorchFunctionMode):
    """Tells of the products with some parameters that torch is asked for; what is returned takes their place."""

    def __init__(self, parts: dict[str, Tensor], tell: Callable[[_Use, Tensor], Tensor]) -> None:
        super().__init__()
        self._views = {id(part): _Use(name, part, part) for name, part in parts.items()}
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        view = self._made(func, args, output)
        if view is not None:
            self._views[id(output)] = view._replace(tensor=output)
            return output
        use = self._use(func, args, kwargs or {})
        return output if use is None else self._tell(use, output)

    def _made(self, func: Any, args: Any, output: Any) -> _Use | None:
        """Return the view of a parameter that an operation has made."""
        view = self._views.get(id(args[0])) if args else None
        if view is None:
            return None
        if func in _TRANSPOSES and (output.shape, output.stride()) == (args[0].mT.shape, args[0].mT.stride()):
            return view._replace(is_transposed=not view.is_transposed)
        if func is Tensor.__getitem__ and view.weight.ndim == 3 and view.place is None:
            index = args[1]
            is_scalar = isinstance(index, Tensor) and index.ndim == 0 and not index.dtype.is_floating_point
            return view._replace(place=int(index)) if is_scalar or isinstance(index, int) else None
        return None

    def _use(self, func: Any, args: Any, kwargs: Any) -> _Use | None:
        # x W is x (Wᵀ)ᵀ.
        bias, turned = None, True
        if func is nn.functional.linear:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            inputs, weight, bias, turned = given["input"], given["weight"], given.get("bias"), False
        elif len(args) > 1 and func in _PRODUCTS:
            inputs, weight = args[0], args[1]
        elif len(args) > 2 and func is torch.addmm:
            bias, inputs, weight = args[:3]
        else:
            return None
        view, known = self._views.get(id(weight)), self._views.get(id(bias))
        if view is None:
            return None
        offsets = kwargs.get("offs", args[2] if len(args) > 2 else None) if func in _GROUPED else None
        bias_name = "" if known is None else known.name
        return view._replace(is_transposed=view.is_transposed != turned, inputs=inputs, bias=bias_name, offsets=offsets)


def _uses(module: nn.Module, parts: dict[str, Tensor]) -> list[_Use]:
    """Return the products with its matrices that a module asks for, as a try with random numbers shows."""
    found: dict[str, _Use] = {}

    def note(use: _Use, output: Tensor) -> Tensor:
        found.setdefault(use.name, use)
        return output

    for d_in in {length: None for part in parts.values() if part.ndim == 2 for length in part.shape}:
        first = next(iter(parts.values()))
        with _Products(parts, note):
            done = run(module, parts, random((2, 3, d_in), first.device)) is not None
        if done and found:
            return list(found.values())
        found.clear()
    return []
