"""Finds the weights of a model that are preconditioned, and the reasons why others are left to the optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from brandla import _check
from brandla.kfac.capture.calls import Recorder
from brandla.kfac.capture.kinds.attention import AttentionKind
from brandla.kfac.capture.kinds.conv import ConvKind, ConvTransposeKind
from brandla.kfac.capture.kinds.inside import used_inside
from brandla.kfac.capture.kinds.kind import Kind, is_leaf, overridden_forward
from brandla.kfac.capture.kinds.like import known_map, registered
from brandla.kfac.capture.kinds.linear import BagKind, BilinearKind, EmbeddingKind, LinearKind, TiedEmbeddingKind
from brandla.kfac.capture.kinds.norm import NormKind
from brandla.kfac.capture.kinds.recurrent import CellKind
from brandla.kfac.capture.layer import Layer, Sharing
from brandla.kfac.options import named_modules, option_of
from brandla.kfac.systems.strategy import Strategy

_FAMILIES: list[type[Kind]] = [LinearKind, ConvKind, ConvTransposeKind, EmbeddingKind, AttentionKind]
_FAMILIES += [NormKind, BilinearKind, BagKind, CellKind]
# The layer's name if the model itself is a layer.
ROOT = "(model)"


def find_layers(
    model: nn.Module, inverse: Mapping[str, Strategy | None], sharing: Mapping[str, Sharing], recorder: Recorder
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers of a model, and why each other module or parameter is left to the optimizer."""
    groups, left = _find(model)
    layers: list[Layer] = []
    biases: dict[int, Kind] = {}
    for group in map(_with_tied_embeddings, groups):
        first, *others = group
        strategies = [option_of(inverse, kind.name) for kind in group]
        same_use = type(first), TiedEmbeddingKind
        different = [own for own in others if own.shape != first.shape or type(own) not in same_use]
        if different:
            left |= {kind.name: f"{first.name} uses the same weight differently" for kind in others}
            left[first.name] = f"{different[0].name} uses the same weight differently"
        elif (strategy := strategies[0]) is None or None in strategies:
            left |= {kind.name: "inverse is None" for kind in group}
        else:
            left |= _leave_shared_bias(group, biases)
            layers.append(Layer(first, strategy, option_of(sharing, first.name), recorder))
            for kind in others:
                layers[-1].attach(kind)
                if kind.bias is not None and kind.bias is not first.bias:
                    left[f"{kind.name}.bias"] = f"{first.name} has the same weight and another bias"
    if not layers:
        types = sorted({type(module).__name__ for module in model.modules()})
        _check.fail_value(
            "KFAC",
            "the model must have an nn.Linear or another layer that can be preconditioned; got modules of type "
            f"{', '.join(types)}; register them with brandla.kfac.register, or train with the optimizer alone",
        )
    return layers, left


def _find(model: nn.Module) -> tuple[list[list[Kind]], dict[str, str]]:
    """Return the users of each weight that can be preconditioned, and why other modules and parameters cannot be."""
    users: dict[tuple[int, int | None], list[Kind]] = {}
    modules: dict[str, tuple[nn.Module, list[Kind] | str | None]] = {}
    covered: set[int] = set()
    for name, module in named_modules(model):
        kinds = _kinds_of(module)
        modules[name] = module, kinds
        for kind in kinds if isinstance(kinds, list) else []:
            covered |= {id(kind.weight), id(kind.bias)}
            kind.name = ".".join(part for part in (name, kind.part) if part) or ROOT
            users.setdefault((id(kind.weight), kind.index), []).append(kind)
    left: dict[str, str] = {}
    for name, (module, kinds) in modules.items():
        trained = [key for key, part in module.named_parameters(recurse=False) if part.requires_grad]
        uncovered = [key for key in trained if id(getattr(module, key)) not in covered]
        type_name = type(module).__name__
        if isinstance(kinds, str):
            left |= {name or ROOT: kinds} if uncovered or not trained else {}
        elif kinds is None and is_leaf(module) and uncovered:
            remedy = f"; brandla.kfac.register(torch.nn.{type_name}, like='unrolled') runs them one by one"
            is_fused = type(module) in (nn.LSTM, nn.GRU, nn.RNN)
            fused = f": its time steps are one fused call{remedy}" if is_fused else ""
            left[name or ROOT] = f"{type_name} is not known{fused}"
        else:
            reason = f"{type_name} uses it by itself" if kinds is None else "it belongs to no known weight"
            left |= {f"{name}.{key}".lstrip("."): reason for key in uncovered}
    return list(users.values()), left


def _kinds_of(module: nn.Module) -> list[Kind] | str | None:
    """Return the weights of a module, or why they are left to the optimizer; None if the module is unknown.

    Types that a user has registered come first, then the types of torch. Other modules run on random numbers, to find
    out what they compute.
    """
    kinds = registered(module)
    for family in _FAMILIES:
        kinds = family.of(module) if kinds is None else kinds
    if kinds is not None and kinds != overridden_forward(module):
        return kinds
    return known_map(module) or used_inside(module) or kinds


def _with_tied_embeddings(group: list[Kind]) -> list[Kind]:
    """Put a Linear that uses the weight first. Embeddings tied to it use the weight's transpose."""
    first = next((kind for kind in group if type(kind) is LinearKind), None)
    if first is None:
        return group
    others = [kind for kind in group if kind is not first]
    for index, kind in enumerate(others):
        if type(kind) is EmbeddingKind:
            others[index] = TiedEmbeddingKind(kind.module)
            others[index].name = kind.name
    return [first, *others]


def _leave_shared_bias(group: list[Kind], biases: dict[int, Kind]) -> dict[str, str]:
    """Leave a bias to an earlier layer that shares it, and return the reasons."""
    first = group[0]
    owner = first if first.bias is None else biases.setdefault(id(first.bias), first)
    # Attention has one bias for several weights.
    if owner.module is first.module:
        return {}
    names = [kind.name for kind in group if kind.bias is not None]
    for kind in group:
        kind.bias_name = ""
    return {f"{name}.bias": f"it belongs to {owner.name}" for name in names}
