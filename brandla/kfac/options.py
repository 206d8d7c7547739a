"""The options of the preconditioner, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, TypeVar

from torch import nn

from brandla import _check
from brandla.kfac.adaptive import Adaptive
from brandla.kfac.capture.fisher import CurvatureType
from brandla.kfac.capture.layer import Layer, Sharing
from brandla.kfac.systems.schedule import Schedule, at, spelled
from brandla.kfac.systems.strategy import Strategy
from brandla.kfac.values import Scale

# The name that torch.compile gives to the module that it wraps.
_WRAPPED = "_orig_mod"
Option = TypeVar("Option")
ClipBy: TypeAlias = Literal["rms", "kl", "spectral"]
ByModule: TypeAlias = Option | Mapping[str, Option] | Callable[[str, nn.Module], Option]


@dataclass(frozen=True)
class Options:
    """The options of a preconditioner. Schedules are checked at every step."""

    damping: Schedule[float] | Adaptive
    clip: Schedule[float | None]
    decay: Schedule[float]
    factor_every: Schedule[int]
    damping_scale: Scale
    clip_by: ClipBy
    application: Literal["auto", "two-sided"]
    gradient: Literal["autograd", "pair"]
    curvature: CurvatureType
    seed: int

    def __post_init__(self) -> None:
        _check.choice("KFAC", "damping_scale", self.damping_scale, ("relative", "absolute"))
        _check.choice("KFAC", "clip_by", self.clip_by, ("rms", "kl", "spectral"))
        _check.choice("KFAC", "application", self.application, ("auto", "two-sided"))
        _check.choice("KFAC", "gradient", self.gradient, ("autograd", "pair"))
        _check.choice("KFAC", "curvature", self.curvature, ("empirical", "monte-carlo", "type-2"))
        _check.count("KFAC", "seed", self.seed, 0)
        self.at(0)

    def __str__(self) -> str:
        return ", ".join(f"{option.name}={spelled(getattr(self, option.name))}" for option in fields(self))

    def at(self, step: int) -> AtStep:
        """Return the values of a step, or raise if a schedule gives a value out of range."""
        clip = at(self.clip, step)
        damping = self.damping.initial if isinstance(self.damping, Adaptive) else at(self.damping, step)
        decay, factor_every = at(self.decay, step), at(self.factor_every, step)
        if not 0 < damping < float("inf"):
            _check.fail_value("KFAC", f"damping must be finite and > 0; got {damping}")
        if clip is not None and not 0 < clip < float("inf"):
            _check.fail_value("KFAC", f"clip must be finite and > 0, or None; got {clip}")
        if not 0 <= decay < 1:
            _check.fail_value("KFAC", f"decay must be in [0, 1); got {decay}")
        _check.count("KFAC", "factor_every", factor_every, 1)
        return AtStep(damping, clip, decay, factor_every)


@dataclass(frozen=True)
class AtStep:
    """The values of the schedules at one step."""

    damping: float
    clip: float | None
    decay: float
    factor_every: int


def named_modules(model: nn.Module, *, aliases: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model with their names, parents first. A wrapper has the name of the module inside.

    A module that is in several places has the name of the first place, or with ``aliases`` the names of all.
    """
    for name, module in model.named_modules(remove_duplicate=not aliases):
        yield ".".join(part for part in name.split(".") if part != _WRAPPED), module


def by_module(model: nn.Module, name: str, option: ByModule[Any], default: Any) -> dict[str, Any]:
    """Return a mapping from module names to an option, with the default under the empty name."""
    if callable(option) and not isinstance(option, type):
        return {module_name: option(module_name, module) for module_name, module in named_modules(model)}
    rule: dict[str, Any] = {"": default, **option} if isinstance(option, Mapping) else {"": option}
    names, aliases = dict(named_modules(model)), dict(named_modules(model, aliases=True))
    for module in rule:
        if module not in names:
            first = next((first for first, own in names.items() if own is aliases.get(module)), None)
            got = f"it has no module {module!r}" if first is None else f"{module!r} is {first!r}: use this name"
            _check.fail_value("KFAC", f"{name} must name modules of the model; {got}")
    return rule


def strategies(model: nn.Module, inverse: ByModule[Strategy | None], default: Strategy) -> dict[str, Strategy | None]:
    """Check ``inverse`` and return it by module name. Equal strategies become one object."""
    rule = by_module(model, "inverse", inverse, default)
    for strategy in rule.values():
        if not isinstance(strategy, Strategy | None):
            got = type(strategy).__name__
            if isinstance(strategy, type):
                got = f"the class {strategy.__name__}; construct it, as {strategy.__name__}(...)"
            _check.fail_type("KFAC", f"inverse must be a strategy such as Brand(rank=128), or None; got {got}")
    unique = {strategy: strategy for strategy in rule.values()}
    return {module: unique[strategy] for module, strategy in rule.items()}


def sharings(model: nn.Module, sharing: ByModule[Sharing]) -> dict[str, Sharing]:
    """Check ``sharing`` and return it by module name."""
    rule = by_module(model, "sharing", sharing, "expand")
    for value in rule.values():
        _check.choice("KFAC", "sharing", value, ("expand", "reduce"))
    return rule


def set_order(model: nn.Module, batch_first: ByModule[bool | None], layers: Iterable[Layer]) -> None:
    """Check ``batch_first``, and set for each layer whether samples come before positions, and why."""
    rule = by_module(model, "batch_first", batch_first, None)
    for value in rule.values():
        if not isinstance(value, bool | None):
            _check.fail_value("KFAC", f"batch_first must be True, False or None; got {value!r}")
    modules = dict(named_modules(model))
    for layer in layers:
        if layer.kind.either_order:
            holder = layer.name
            first = option_of(rule, holder if holder in modules else holder.rpartition(".")[0])
            why = "as batch_first says"
            if first is None:
                while (first := _declared_order(modules.get(holder))) is None and holder:
                    holder = holder.rpartition(".")[0]
                why = "assumed" if first is None else f"as {holder or 'the model'} says"
            layer.batch_first = first is not False
            layer.order = f"{'samples' if layer.batch_first else 'positions'} first, {why}"


def _declared_order(module: Any) -> bool | None:
    """Return the ``batch_first`` of a module, if it has one."""
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        module = module.layers[0]
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    order = getattr(module, "batch_first", None)
    return order if isinstance(order, bool) else None


def option_of(rule: Mapping[str, Option], name: str) -> Option:
    """Return a module's option in a rule: the rule may name the module, a parent, or the whole model as ``""``."""
    while name not in rule:
        name = name.rpartition(".")[0]
    return rule[name]
