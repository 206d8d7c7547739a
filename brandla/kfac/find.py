"""Which weights of a model are preconditioned, and which modules are left to the optimizer, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from brandla import _check
from brandla.kfac.capture.calls import Recorder
from brandla.kfac.capture.kinds import EmbeddingKind, Kind, LinearKind, TurnedEmbeddingKind, is_leaf, kinds_of
from brandla.kfac.capture.layer import Layer, Sharing
from brandla.kfac.options import named_modules, of_module
from brandla.kfac.systems.strategy import Strategy

# The name of the layer where the model itself is one.
ROOT = "(model)"
_FUSED = ": its time steps are one fused call; brandla.kfac.register(torch.nn.{}, like='unrolled') has them in sight"
_HINTS: dict[type[nn.Module], str] = {kind: _FUSED.format(kind.__name__) for kind in (nn.LSTM, nn.GRU, nn.RNN)}


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
    for group in found.values():
        first, *others = _with_turned(group)
        other_kind = next((other for other in others if not _is_alike(first.kind, other.kind)), None)
        strategies = [of_module(inverse, one.name) for one in (first, *others)]
        if other_kind is not None:
            left |= {one.name: f"its weight is also that of {first.name}, used differently" for one in others}
            left[first.name] = f"its weight is also that of {other_kind.name}, used differently"
        elif (strategy := strategies[0]) is None or None in strategies:
            left |= {one.name: "inverse is None" for one in (first, *others)}
        else:
            left |= _leave_known_bias([first, *others], biases)
            layers.append(Layer(first.name, first.kind, strategy, of_module(sharing, first.name), recorder))
            for name, kind in others:
                layers[-1].attach(kind)
                if kind.bias is not None and kind.bias is not first.kind.bias:
                    left[f"{name}.bias"] = f"its weight is that of {first.name}, which has another bias"
    if not layers:
        kinds_of_modules = sorted({type(module).__name__ for module in model.modules()})
        _check.fail_value(
            "KFAC",
            "the model must have an nn.Linear or another layer that can be preconditioned; got modules of type "
            f"{', '.join(kinds_of_modules)}; name what they compute with brandla.kfac.register, or train it with the"
            " optimizer alone",
        )
    return layers, left


def _find(model: nn.Module) -> tuple[dict[tuple[int, ...], list[_Found]], dict[str, str]]:
    """Return the users of each weight that can be preconditioned, and why other modules and parameters cannot be."""
    found: dict[tuple[int, ...], list[_Found]] = {}
    known: dict[str, tuple[nn.Module, list[Kind] | str | None]] = {}
    covered: set[int] = set()
    for name, module in named_modules(model):
        kinds = kinds_of(module)
        known[name] = module, kinds
        for kind in kinds if isinstance(kinds, list) else []:
            covered |= {id(kind.weight), id(kind.bias)}
            label = ".".join(part for part in (name, kind.part) if part) or ROOT
            found.setdefault(kind.key, []).append(_Found(label, kind))
    left: dict[str, str] = {}
    for name, (module, kinds) in known.items():
        left |= _left_of(name, module, kinds, covered)
    return found, left


def _left_of(name: str, module: nn.Module, kinds: list[Kind] | str | None, covered: set[int]) -> dict[str, str]:
    """Say why a module, or parameters of it, are left: those that no weight found in the model covers."""
    own = [key for key, part in module.named_parameters(recurse=False) if part.requires_grad]
    others = [key for key in own if id(getattr(module, key)) not in covered]
    if isinstance(kinds, str):
        return {name or ROOT: kinds} if others or not own else {}
    kind = type(module).__name__
    if kinds is None and is_leaf(module):
        return {name or ROOT: f"{kind} is not known{_HINTS.get(type(module), '')}"} if others else {}
    reason = f"{kind} uses it by itself" if kinds is None else "it belongs to no known weight"
    return {f"{name}.{key}".lstrip("."): reason for key in others}


def _with_turned(group: list[_Found]) -> list[_Found]:
    """Put the users that multiply by a weight first; embeddings of the same weight use its transpose."""
    first = next((one for one in group if type(one.kind) is LinearKind), None)
    if first is None:
        return group
    others = [one for one in group if one is not first]
    turned = [TurnedEmbeddingKind(one.kind.module) if type(one.kind) is EmbeddingKind else one.kind for one in others]
    return [first, *(one._replace(kind=kind) for one, kind in zip(others, turned, strict=True))]


def _is_alike(one: Kind, other: Kind) -> bool:
    return (type(one) is type(other) or other.turned) and one.shape == other.shape


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

