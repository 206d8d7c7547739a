"""Which weights of a model are preconditioned, and which modules are left to the optimizer, and why."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from brandla import _check
from brandla.kfac.capture.calls import Recorder
from brandla.kfac.capture.kinds.attention import AttentionKind
from brandla.kfac.capture.kinds.conv import ConvKind, ConvTransposeKind
from brandla.kfac.capture.kinds.inside import used_inside
from brandla.kfac.capture.kinds.kind import Kind, is_leaf, own_forward
from brandla.kfac.capture.kinds.like import of_map, registered
from brandla.kfac.capture.kinds.linear import BagKind, BilinearKind, EmbeddingKind, LinearKind, TurnedEmbeddingKind
from brandla.kfac.capture.kinds.norm import NormKind
from brandla.kfac.capture.kinds.recurrent import CellKind
from brandla.kfac.capture.layer import Layer, Sharing
from brandla.kfac.options import named_modules, of_module
from brandla.kfac.systems.strategy import Strategy

_FAMILIES: list[type[Kind]] = [LinearKind, ConvKind, ConvTransposeKind, EmbeddingKind, AttentionKind]
_FAMILIES += [NormKind, BilinearKind, BagKind, CellKind]
# The name of the layer where the model itself is one.
ROOT = "(model)"


def find_layers(
    model: nn.Module, inverse: Mapping[str, Strategy | None], sharing: Mapping[str, Sharing], recorder: Recorder
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers of a model, and why each other module or parameter is left to the optimizer."""
    groups, left = _find(model)
    layers: list[Layer] = []
    biases: dict[int, Kind] = {}
    for group in map(_with_turned, groups):
        first, *others = group
        strategies = [of_module(inverse, kind.name) for kind in group]
        unlike = [own for own in others if not (own.turned or type(own) is type(first)) or own.shape != first.shape]
        if unlike:
            left |= {kind.name: f"its weight is also that of {first.name}, used differently" for kind in others}
            left[first.name] = f"its weight is also that of {unlike[0].name}, used differently"
        elif (strategy := strategies[0]) is None or None in strategies:
            left |= {kind.name: "inverse is None" for kind in group}
        else:
            left |= _leave_known_bias(group, biases)
            layers.append(Layer(first, strategy, of_module(sharing, first.name), recorder))
            for kind in others:
                layers[-1].attach(kind)
                if kind.bias is not None and kind.bias is not first.bias:
                    left[f"{kind.name}.bias"] = f"its weight is that of {first.name}, which has another bias"
    if not layers:
        kinds_of_modules = sorted({type(module).__name__ for module in model.modules()})
        _check.fail_value(
            "KFAC",
            "the model must have an nn.Linear or another layer that can be preconditioned; got modules of type "
            f"{', '.join(kinds_of_modules)}; name what they compute with brandla.kfac.register, or train it with the"
            " optimizer alone",
        )
    return layers, left


def _find(model: nn.Module) -> tuple[list[list[Kind]], dict[str, str]]:
    """Return the users of each weight that can be preconditioned, and why other modules and parameters cannot be."""
    found: dict[tuple[int, int | None], list[Kind]] = {}
    known: dict[str, tuple[nn.Module, list[Kind] | str | None]] = {}
    covered: set[int] = set()
    for name, module in named_modules(model):
        kinds = _kinds_of(module)
        known[name] = module, kinds
        for kind in kinds if isinstance(kinds, list) else []:
            covered |= {id(kind.weight), id(kind.bias)}
            kind.name = ".".join(part for part in (name, kind.part) if part) or ROOT
            found.setdefault((id(kind.weight), kind.index), []).append(kind)
    left: dict[str, str] = {}
    for name, (module, kinds) in known.items():
        own = [key for key, part in module.named_parameters(recurse=False) if part.requires_grad]
        others = [key for key in own if id(getattr(module, key)) not in covered]
        of_type = type(module).__name__
        if isinstance(kinds, str):
            left |= {name or ROOT: kinds} if others or not own else {}
        elif kinds is None and is_leaf(module) and others:
            remedy = f"; brandla.kfac.register(torch.nn.{of_type}, like='unrolled') has them in sight"
            is_fused = type(module) in (nn.LSTM, nn.GRU, nn.RNN)
            fused = f": its time steps are one fused call{remedy}" if is_fused else ""
            left[name or ROOT] = f"{of_type} is not known{fused}"
        else:
            reason = f"{of_type} uses it by itself" if kinds is None else "it belongs to no known weight"
            left |= {f"{name}.{key}".lstrip("."): reason for key in others}
    return list(found.values()), left


def _kinds_of(module: nn.Module) -> list[Kind] | str | None:
    """Return the weights of a module, or why they are left to the optimizer; None if nothing is known of it.

    What a user has registered comes first, then the types of torch; of others it is found out what they compute.
    """
    found = registered(module)
    for family in _FAMILIES:
        found = family.of(module) if found is None else found
    if found is not None and found != own_forward(module):
        return found
    return of_map(module) or used_inside(module) or found


def _with_turned(group: list[Kind]) -> list[Kind]:
    """Put the users that multiply by a weight first; embeddings of the same weight use its transpose."""
    first = next((kind for kind in group if type(kind) is LinearKind), None)
    if first is None:
        return group
    others = [kind for kind in group if kind is not first]
    for index, kind in enumerate(others):
        if type(kind) is EmbeddingKind:
            others[index] = TurnedEmbeddingKind(kind.module)
            others[index].name = kind.name
    return [first, *others]


def _leave_known_bias(group: list[Kind], biases: dict[int, Kind]) -> dict[str, str]:
    """Leave a bias to the layer found before that has it too, and say so."""
    first = group[0]
    owner = first if first.bias is None else biases.setdefault(id(first.bias), first)
    # Attention has one bias for several weights.
    if owner.module is first.module:
        return {}
    left = [kind.name for kind in group if kind.bias is not None]
    for kind in group:
        kind.bias_name = ""
    return {f"{name}.bias": f"it is also that of {owner.name}" for name in left}
