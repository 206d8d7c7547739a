"""Weights that a module multiplies by inside its forward pass: routers, experts, matrices in custom modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from brandla.kfac.capture.kinds.kind import Kind, is_leaf, unusable
from brandla.kfac.capture.kinds.like import random, random_parts, run
from brandla.kfac.capture.kinds.watched_forward import ForwardKind, WatchedForward

# mypy mistakes the properties for the tensors that they return.
_PROPERTIES: tuple[Any, ...] = (Tensor.T, Tensor.mT)
_TRANSPOSES: Any = {Tensor.t, torch.t, Tensor.transpose, torch.transpose, *(part.__get__ for part in _PROPERTIES)}
_GROUPED: Any = {getattr(nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)} - {None}
_PRODUCTS: Any = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm} | _GROUPED


class InsideKind(ForwardKind):
    """A weight that a module multiplies by inside its forward pass: a whole parameter, or one of its experts."""

    either_order = True

    def __init__(
        self, forward: InsideForward, weight: str, bias: str = "", index: int | None = None, *, transposed: bool
    ) -> None:
        super().__init__(forward, weight, bias, "" if index is None else f"{weight}.{index}")
        self.pairs = index is None
        # For experts, this is a guess until the first call.
        self.transposed = transposed
        self.index = index

    @property
    def was_seen(self) -> bool:
        return self._weight in self._forward.used


def used_inside(module: nn.Module) -> list[Kind] | str | None:
    """Return the weights of a module that holds experts or multiplies by its own matrices; None for others."""
    parts = {name: part for name, part in module._parameters.items() if part is not None}
    if type(module).__module__.startswith("torch.nn") or not is_leaf(module):
        return None
    names = [name for name, part in parts.items() if part.ndim > 1]
    forward = InsideForward.of(module)
    if not names or forward is None or unusable(module, *names):
        return None
    cubes = [name for name in names if parts[name].ndim == 3]
    if cubes:
        count = len(parts[cubes[0]])
        are_experts = all(len(part) == count and part.ndim <= 3 for part in parts.values())
        if not are_experts or any(min(parts[name].shape) < 2 for name in cubes):
            return None
        transposed = bool(getattr(module, "is_transposed", False))
        return [InsideKind(forward, name, index=i, transposed=transposed) for name in cubes for i in range(count)]
    products = _find_products(module, random_parts(module))
    return [InsideKind(forward, own.name, own.bias, transposed=own.is_transposed) for own in products] or None


class InsideForward(WatchedForward):
    """The forward pass of a module, watched for products with its parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # The parameters that calls have used so far.
        self.used: set[str] = set()

    def run_watched(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _ProductMode(module._parameters, self._on_product):
            return type(module).forward(module, *args, **kwargs)

    def _on_product(self, product: _Product, output: Tensor) -> Tensor:
        name, weight = product.name, product.weight
        if weight.ndim == 3 and product.expert is None and product.offsets is None and output.ndim != 3:
            return output
        self.used.add(name)
        if weight.ndim < 3 or product.expert is not None:
            part = name if product.expert is None else f"{name}.{product.expert}"
            return self._record(part, product, product.inputs, output)
        if product.offsets is None:
            inputs, outputs, join = product.inputs.expand(*output.shape[:-1], -1).unbind(), output.unbind(), torch.stack
        else:
            ends = product.offsets.tolist()
            counts = [end - start for start, end in zip([0, *ends], [*ends, len(output)], strict=True)]
            inputs, outputs, join = product.inputs.split(counts), output.split(counts), torch.cat
        pieces = enumerate(zip(inputs, outputs, strict=True))
        return join([self._record(f"{name}.{index}", product, *piece) for index, piece in pieces])

    def _record(self, part: str, product: _Product, inputs: Tensor, output: Tensor) -> Tensor:
        for kind, _, _ in self.attached.get(part, ()):
            kind.transposed = product.is_transposed
        return self.recorded(part, inputs, output) if output.numel() else output


class _Product(NamedTuple):
    """A product with a whole parameter or one ``expert`` of it: x weightᵀ, or x weight if it ``is_transposed``.

    It holds the ``tensor``, so that no other tensor can get the same id. ``offsets`` say where the rows of each expert
    end in a grouped product. A view that is not multiplied yet is kept as a product without ``inputs``.
    """

    name: str
    weight: Tensor
    tensor: Tensor
    expert: int | None = None
    is_transposed: bool = False
    inputs: Any = None
    bias: str = ""
    offsets: Tensor | None = None


class _ProductMode(TorchFunctionMode):
    """Calls ``on_product`` at each product with a parameter; its result replaces the product."""

    def __init__(self, parts: Mapping[str, Tensor | None], on_product: Callable[[_Product, Tensor], Tensor]) -> None:
        super().__init__()
        self._views = {id(part): _Product(name, part, part) for name, part in parts.items() if part is not None}
        self._on_product = on_product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        view = self._new_view(func, args, output)
        if view is not None:
            self._views[id(output)] = view._replace(tensor=output)
            return output
        product = self._product(func, args, kwargs or {})
        return output if product is None else self._on_product(product, output)

    def _new_view(self, func: Any, args: Any, output: Any) -> _Product | None:
        """Return the view of a parameter that an operation has made, if any."""
        view = self._views.get(id(args[0])) if args else None
        if view is None:
            return None
        if func in _TRANSPOSES and (output.shape, output.stride()) == (args[0].mT.shape, args[0].mT.stride()):
            return view._replace(is_transposed=not view.is_transposed)
        if func is Tensor.__getitem__ and view.weight.ndim == 3 and view.expert is None:
            index = args[1]
            is_scalar = isinstance(index, Tensor) and index.ndim == 0 and not index.dtype.is_floating_point
            return view._replace(expert=int(index)) if is_scalar or isinstance(index, int) else None
        return None

    def _product(self, func: Any, args: Any, kwargs: Any) -> _Product | None:
        """Return the product with a parameter that an operation computes, if any."""
        # All operations but linear multiply by W: x W is x (Wᵀ)ᵀ.
        bias, transposes = None, True
        if func is nn.functional.linear:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
            inputs, weight, bias, transposes = given["input"], given["weight"], given.get("bias"), False
        elif len(args) > 1 and func in _PRODUCTS:
            inputs, weight = args[0], args[1]
        elif len(args) > 2 and func is torch.addmm:
            bias, inputs, weight = args[:3]
        else:
            return None
        view, bias_view = self._views.get(id(weight)), self._views.get(id(bias))
        if view is None:
            return None
        offsets = kwargs.get("offs", args[2] if len(args) > 2 else None) if func in _GROUPED else None
        bias_name, is_transposed = "" if bias_view is None else bias_view.name, view.is_transposed != transposes
        return view._replace(is_transposed=is_transposed, inputs=inputs, bias=bias_name, offsets=offsets)


def _find_products(module: nn.Module, parts: dict[str, Tensor]) -> list[_Product]:
    """Run a module on random numbers, and return its products with its matrices."""
    found: dict[str, _Product] = {}

    def note(product: _Product, output: Tensor) -> Tensor:
        found.setdefault(product.name, product)
        return output

    for d_in in {length: None for part in parts.values() if part.ndim == 2 for length in part.shape}:
        first = next(iter(parts.values()))
        with _ProductMode(parts, note):
            done = run(module, parts, random((2, 3, d_in), first.device)) is not None
        if done and found:
            return list(found.values())
        found.clear()
    return []
