"""Modules of any type that compute a known map with one weight: `register` names them, or a trial run finds them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from brandla import _check
from brandla.kfac.capture.kinds.kind import Kind, is_leaf, unusable
from brandla.kfac.capture.kinds.linear import LinearKind, TransposedKind
from brandla.kfac.capture.kinds.norm import NormKind
from brandla.kfac.capture.kinds.recurrent import unrolled

Registered: TypeAlias = Literal["linear", "transposed", "unrolled"]
_REGISTERED: dict[type[nn.Module], Registered] = {}


def register(module: type[nn.Module], *, like: Registered) -> None:
    """Tell K-FAC what modules of a type compute, if it cannot find out by itself.

    `KFAC` runs modules that have one weight, and at most a ``bias`` beside it, on random numbers. So most modules need
    no registration. It is for modules that cannot be called with one tensor alone.

    Parameters
    ----------
    module
        The type. Its subclasses are registered too.
    like
        The map that a call applies to the last dimension of its first argument x. ``"linear"``: x weightᵀ + bias.
        ``"transposed"``: x weight + bias. ``"unrolled"``, for ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: in captured
        passes, the layer runs step by step instead of in one fused call.

    Raises
    ------
    ValueError, TypeError
        For any other argument.

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
    """Return the weights of a module whose type a user has registered; None for others."""
    like = next((_REGISTERED[kind] for kind in type(module).__mro__ if kind in _REGISTERED), None)
    if like == "unrolled":
        return unrolled(module)
    return None if like is None else known_map(module, like)


def known_map(module: nn.Module, like: str | None = None) -> list[Kind] | str | None:
    """Return the weight of a module that computes the map ``like``, or one that a trial finds; None for others."""
    names = [name for name, part in module._parameters.items() if part is not None]
    weights = [name for name in names if name != "bias"]
    if len(weights) != 1 or not is_leaf(module):
        return None
    weight, bias = weights[0], "bias" if "bias" in names else ""
    if reason := unusable(module, weight):
        return reason
    like = like or find_map(module, weight, bias)
    return None if like is None else [_KINDS[like](module, weight, bias)]


class ScaleKind(NormKind):
    """weight · x̂ + bias in each channel of the last dimension, such as RMSNorms of any package.

    x̂ is the module's output with weights 1 minus its output with weights 0.
    """

    either_order = True

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
    """Return the output of a module's forward pass with other parameters; None if it raises.

    It runs on a copy with no hooks. The module, its buffers, its lists and dicts, and the process's random generator
    stay as they are.
    """
    twin: Any = module.__new__(type(module))
    parameters = {**dict.fromkeys(module._parameters), **parts}
    buffers = {name: None if part is None else part.clone() for name, part in module._buffers.items()}
    attributes = {
        name: copy.copy(part) if isinstance(part, list | dict | set) else part for name, part in vars(module).items()
    }
    vars(twin).update(attributes, _parameters=parameters, _buffers=buffers)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            return type(module).forward(twin, *inputs)
        # An unknown forward pass may raise anything. Then it is no known map.
        except Exception:
            return None


def find_map(module: nn.Module, name: str, bias_name: str) -> str | None:
    """Return the known map of the last dimension that a module computes with its weight and bias; otherwise None."""
    parts = random_parts(module)
    weight, bias = parts[name], parts.get(bias_name)
    # Two leading dimensions reject modules whose features are not in the last dimension.
    trials = [random((2, 3, length), weight.device) for length in weight.shape]
    candidates: list[tuple[str, Tensor, Tensor]] = []
    if weight.ndim == 2:
        candidates = [("linear", trials[1], trials[1] @ weight.mT), ("transposed", trials[0], trials[0] @ weight)]
    elif weight.ndim == 1 and weight.numel() > 1:
        unit, zero = unit_and_zero(module, name, trials[0])
        if isinstance(unit, Tensor) and isinstance(zero, Tensor) and not torch.equal(unit, zero):
            # w x̂ + c + b, where x̂ and c depend on the input alone.
            candidates = [("scale", trials[0], (unit - zero) * weight + zero)]
    for like, inputs, product in candidates:
        if bias is None or bias.shape == product.shape[-1:]:
            output, expected = run(module, parts, inputs), product if bias is None else product + bias
            is_shaped = isinstance(output, Tensor) and output.shape == expected.shape
            if is_shaped and torch.allclose(output.to(expected.dtype), expected, rtol=1e-4, atol=1e-4):
                return like
    return None


def random_parts(module: nn.Module) -> dict[str, Tensor]:
    """Return random numbers in the shapes of a module's own parameters."""
    parts = {name: part for name, part in module._parameters.items() if part is not None}
    return {name: random(tuple(part.shape), part.device) for name, part in parts.items()}


def unit_and_zero(module: nn.Module, name: str, inputs: Tensor) -> tuple[Any, Any]:
    """Return the outputs of a module with all weights 1 and with all weights 0. The bias is 0."""
    zeros = {key: inputs.new_zeros(part.shape) for key, part in module._parameters.items() if part is not None}
    ones = torch.ones_like(zeros[name])
    return run(module, {**zeros, name: ones}, inputs), run(module, zeros, inputs)


def random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return integers from −3 to 3, whose products float32 sums without rounding."""
    device = torch.device("cpu") if device.type == "meta" else device
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).to(device, torch.float32)
