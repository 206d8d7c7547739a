"""Which weights of a model are preconditioned, and which modules are left to the optimizer, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from brandla import _check
from brandla.kfac.capture.calls import Recorder
from brandla.kfac.capture.kinds import KINDS, Kind
from brandla.kfac.capture.layer import Layer, Sharing
from brandla.kfac.options import named_modules, of_module
from brandla.kfac.systems.strategy import Strategy

# The name of the layer where the model itself is one.
ROOT = "(model)"


class _Found(NamedTuple):
    """One weight of one module."""

    name: str
    kind: Kind


def find_layers(
    model: nn.Module,
    inverse: Mapping[str, Strategy | None],
    sharing: Mapping[str, Sharing],
    recorder: Recorder,
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers of a model, and why each other module or parameter is left to the optimizer."""
    found, left = _find(model)
    layers: list[Layer] = []
    biases: dict[int, _Found] = {}
    for first, *others in found.values():
        strategy = of_module(inverse, first.name)
        other_kind = next((other for other in others if not _is_alike(first.kind, other.kind)), None)
        if other_kind is not None:
            left |= {one.name: f"its weight is also that of {first.name}, used differently" for one in others}
            left[first.name] = f"its weight is also that of {other_kind.name}, used differently"
        elif strategy is None:
            left |= {one.name: "inverse is None" for one in (first, *others)}
        else:
            left |= _leave_known_bias([first, *others], biases)
            layers.append(Layer(first.name, first.kind, strategy, of_module(sharing, first.name), recorder))
            left |= _attach(layers[-1], others)
    if not layers:
        kinds_of_modules = sorted({type(module).__name__ for module in model.modules()})
        _check.fail_value(
            "KFAC",
            "the model must have an nn.Linear or another layer that can be preconditioned; got modules of type "
            f"{', '.join(kinds_of_modules)}; train it with the optimizer alone",
        )
    return layers, left


def _find(model: nn.Module) -> tuple[dict[int, list[_Found]], dict[str, str]]:
    """Return the users of each weight that can be preconditioned, and why other modules and parameters cannot be."""
    found: dict[int, list[_Found]] = {}
    left: dict[str, str] = {}
    covered: set[int] = set()
    for name, module in named_modules(model):
        kinds = _kinds_of(module)
        for kind in kinds if isinstance(kinds, list) else []:
            covered |= {id(kind.weight), id(kind.bias)}
            label = ".".join(part for part in (name, kind.part) if part) or ROOT
            found.setdefault(id(kind.weight), []).append(_Found(label, kind))
        own = [key for key, part in module.named_parameters(recurse=False) if part.requires_grad]
        others = [key for key in own if id(getattr(module, key)) not in covered]
        if isinstance(kinds, list):
            left |= {f"{name}.{key}".lstrip("."): "it belongs to no known weight" for key in others}
        elif others or (kinds is not None and not own):
            left[name or ROOT] = kinds or f"{type(module).__name__} is not known"
    return found, left


def _kinds_of(module: nn.Module) -> list[Kind] | str | None:
    for family in KINDS:
        kinds = family.of(module)
        if kinds is not None:
            return kinds
    return None


def _is_alike(one: Kind, other: Kind) -> bool:
    return type(one) is type(other) and one.shape == other.shape


def _leave_known_bias(group: list[_Found], biases: dict[int, _Found]) -> dict[str, str]:
    """Leave a bias to the layer found before that has it too, and say so."""
    first = group[0]
    if first.kind.bias is None:
        return {}
    owner = biases.setdefault(id(first.kind.bias), first)
    # Attention has one bias for several weights.
    if owner.kind.module is first.kind.module:
        return {}
    left = [one.name for one in group if one.kind.bias is not None]
    for one in group:
        one.kind.leave_bias()
    return {f"{name}.bias": f"it is also that of {owner.name}" for name in left}


def _attach(layer: Layer, others: list[_Found]) -> dict[str, str]:
    """Have a layer watch all modules with its weight, and return the biases among theirs that it leaves."""
    left = {}
    for name, kind in others:
        layer.capture.attach(kind)
        if kind.bias is not None and kind.bias is not layer.kind.bias:
            left[f"{name}.bias"] = f"its weight is that of {layer.name}, which has another bias"
    return left
