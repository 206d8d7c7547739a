"""Modules of any type that compute a known map with one weight: named by `register`, or found by trying them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from brandla import _check
from brandla.kfac.capture.kinds.kind import Kind, is_leaf, why_left
from brandla.kfac.capture.kinds.linear import LinearKind, TransposedKind
from brandla.kfac.capture.kinds.norm import NormKind
from brandla.kfac.capture.kinds.recurrent import unrolled

Registered: TypeAlias = Literal["linear", "transposed", "unrolled"]
_REGISTERED: dict[type[nn.Module], Registered] = {}


def register(module: type[nn.Module], *, like: Registered) -> None:
    """Tell K-FAC what modules of a type compute, if it cannot find out by itself.

    `KFAC` tries modules with one weight, and at most a ``bias`` beside it, with random numbers. So most modules need no
    registration: it is for modules that cannot be called with one tensor alone.

    Parameters
    ----------
    module
        The type; its subclasses are meant too.
    like
        What a call makes of its first argument x, in its last dimension: ``"linear"``: x weightᵀ + bias.
        ``"transposed"``: x weight + bias.
        ``"unrolled"``, for ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: run the layer step by step instead of one fused
        call, in passes that are captured.

    Raises
    ------
    ValueError, TypeError
        For anything else.

    Examples
    --------
    >>> import torch, brandla.kfac
    >>> class Gated(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.randn(3, 4))
    ...
    ...     def forward(self, inputs, gate):
    ...         return torch.nn.functional.linear(inputs, self.weight)
    >>> brandla.kfac.register(Gated, like="linear")
    >>> len(brandla.kfac.KFAC(torch.nn.ModuleList([Gated()])).parameters())
    1
    """
    given: object = module
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        _check.fail_type("register", f"module must be a type of modules, such as MyLinear; got {module!r}")
    choices = ("unrolled",) if issubclass(module, nn.RNNBase) else ("linear", "transposed")
    _check.choice("register", f"like, for {module.__name__},", like, choices)
    _REGISTERED[module] = like


def registered(module: nn.Module) -> list[Kind] | str | None:
    """Return the weight of a module whose type a user has named; None for others."""
    like = next((_REGISTERED[kind] for kind in type(module).__mro__ if kind in _REGISTERED), None)
    if like == "unrolled":
        return unrolled(module)
    return None if like is None else of_map(module, like)


def of_map(module: nn.Module, like: str | None = None) -> list[Kind] | str | None:
    """Return the weight of a module that computes a known map: that one, or one that a try shows; None for others."""
    names = [name for name, part in module._parameters.items() if part is not None]
    weights = [name for name in names if name != "bias"]
    if len(weights) != 1 or not is_leaf(module):
        return None
    own = weights[0], "bias" if "bias" in names else ""
    if reason := why_left(module, own[0]):
        return reason
    like = like or find_like(module, *own)
    return None if like is None else [_KINDS[like](module, *own)]


class ScaleKind(NormKind):
    """weight · x̂ + bias in each channel of the last dimension, such as RMSNorms of any package.

    x̂ is what the module itself gives with weights 1, less what it gives with weights 0.
    """

    may_lead = True

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        if output.shape != inputs.shape or inputs.shape[-1:] != self.weight.shape:
            return f"its input has shape {tuple(inputs.shape)} and its output {tuple(output.shape)}"
        return ""

    def _normalised(self, inputs: Tensor) -> Tensor:
        unit, zero = unit_and_zero(self.module, self._weight, inputs)
        difference: Tensor = unit - zero
        return difference


_KINDS: dict[str, Any] = {"linear": LinearKind, "transposed": TransposedKind, "scale": ScaleKind}


def run(module: nn.Module, parts: Mapping[str, Tensor], *inputs: Tensor) -> Any:
    """Return what a module's forward pass gives with other parameters, on a copy with no hooks; None if it raises.

    The module, its buffers, its lists and dicts, and the random numbers of the process stay as they are.
    """
    own: Any = module.__new__(type(module))
    parameters = {**dict.fromkeys(module._parameters), **parts}
    buffers = {name: None if part is None else part.clone() for name, part in module._buffers.items()}
    attributes = {
        name: copy.copy(part) if isinstance(part, list | dict | set) else part for name, part in vars(module).items()
    }
    vars(own).update(attributes, _parameters=parameters, _buffers=buffers)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            return type(module).forward(own, *inputs)
        # Whatever a stranger's forward pass raises, it is not one of those that are looked for.
        except Exception:
            return None


def find_like(module: nn.Module, name: str, bias_name: str) -> str | None:
    """Say which map of its last dimension a module computes with its weight and bias; None if none that is known."""
    parts = random_parts(module)
    weight, bias = parts[name], parts.get(bias_name)
    # Two dimensions before that of the features: a module that takes another one for them does not get through.
    tried = [random((2, 3, length), weight.device) for length in weight.shape]
    known: list[tuple[str, Tensor, Tensor]] = []
    if weight.ndim == 2:
        known = [("linear", tried[1], tried[1] @ weight.mT), ("transposed", tried[0], tried[0] @ weight)]
    elif weight.ndim == 1 and weight.numel() > 1:
        unit, none = unit_and_zero(module, name, tried[0])
        if isinstance(unit, Tensor) and isinstance(none, Tensor) and not torch.equal(unit, none):
            # w x̂ + c + b, with x̂ and c that depend on the input alone.
            known = [("scale", tried[0], (unit - none) * weight + none)]
    for like, inputs, product in known:
        if bias is None or bias.shape == product.shape[-1:]:
            output, expected = run(module, parts, inputs), product if bias is None else product + bias
            is_shaped = isinstance(output, Tensor) and output.shape == expected.shape
            if is_shaped and torch.allclose(output.to(expected.dtype), expected, rtol=1e-4, atol=1e-4):
                return like
    return None


def random_parts(module: nn.Module) -> dict[str, Tensor]:
    """Return random numbers in the shapes of a module's own parameters."""
    own = {name: part for name, part in module._parameters.items() if part is not None}
    return {name: random(tuple(part.shape), part.device) for name, part in own.items()}


def unit_and_zero(module: nn.Module, name: str, inputs: Tensor) -> tuple[Any, Any]:
    """Return what a module gives with all weights 1, and with all 0; the bias is 0."""
    zeros = {key: inputs.new_zeros(part.shape) for key, part in module._parameters.items() if part is not None}
    ones = torch.ones_like(zeros[name])
    return run(module, {**zeros, name: ones}, inputs), run(module, zeros, inputs)


def random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return whole numbers from −3 to 3, whose products float32 adds up with no rounding."""
    device = torch.device("cpu") if device.type == "meta" else device
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).to(device, torch.float32)
