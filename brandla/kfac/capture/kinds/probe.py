"""What a module of an unknown type computes: its forward pass, tried with weights and inputs of random numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import is_leaf

Like: TypeAlias = Literal["linear", "transposed", "scale"]


class Names(NamedTuple):
    """The parameters of a module with one weight and at most one bias, which is "" where there is none."""

    weight: str
    bias: str

    @classmethod
    def of(cls, module: nn.Module) -> Names | None:
        """Name them; None for a module with other parameters, its own or those of modules in it."""
        names = [name for name, part in module._parameters.items() if part is not None]
        weights = [name for name in names if name != "bias"]
        if len(weights) != 1 or not is_leaf(module):
            return None
        return cls(weights[0], "bias" if "bias" in names else "")


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


def find_like(module: nn.Module, names: Names) -> Like | None:
    """Say which map of its last dimension a module computes with its weight and bias; None if none that is known."""
    parts = random_parts(module)
    weight, bias = parts[names.weight], parts.get(names.bias)
    if weight.ndim == 1 and weight.numel() > 1:
        return "scale" if _is_scale(module, names.weight, parts, bias) else None
    if weight.ndim != 2:
        return None
    maps: list[tuple[Like, Tensor]] = [("linear", weight.mT), ("transposed", weight)]
    fit = (like for like, matrix in maps if _is_linear(module, parts, matrix, bias))
    return next(fit, None)


def random_parts(module: nn.Module) -> dict[str, Tensor]:
    """Return random numbers in the shapes of a module's own parameters."""
    own = {name: part for name, part in module._parameters.items() if part is not None}
    return {name: random(tuple(part.shape), part.device) for name, part in own.items()}


def _is_linear(module: nn.Module, parts: Mapping[str, Tensor], matrix: Tensor, bias: Tensor | None) -> bool:
    inputs = _inputs(matrix[:, 0])
    output = run(module, parts, inputs)
    return _is(output, inputs @ matrix, bias)


def _is_scale(module: nn.Module, name: str, parts: Mapping[str, Tensor], bias: Tensor | None) -> bool:
    """Say whether the output is w x̂ + c + b, with x̂ and c that depend on the input alone."""
    weight = parts[name]
    inputs = _inputs(weight)
    unit, none = unit_and_zero(module, name, inputs)
    if not isinstance(unit, Tensor) or not isinstance(none, Tensor) or torch.equal(unit, none):
        return False
    return _is(run(module, parts, inputs), (unit - none) * weight + none, bias)


def unit_and_zero(module: nn.Module, name: str, inputs: Tensor) -> tuple[Any, Any]:
    """Return what a module gives with all weights 1, and with all 0; the bias is 0."""
    zeros = {key: inputs.new_zeros(part.shape) for key, part in module._parameters.items() if part is not None}
    ones = torch.ones_like(zeros[name])
    return run(module, {**zeros, name: ones}, inputs), run(module, zeros, inputs)


def _is(output: Any, product: Tensor, bias: Tensor | None) -> bool:
    """Compare an output with what it is to be."""
    if not isinstance(output, Tensor) or (bias is not None and bias.shape != product.shape[-1:]):
        return False
    expected = product if bias is None else product + bias
    same = output.shape == expected.shape
    return same and torch.allclose(output.to(expected.dtype), expected, rtol=1e-4, atol=1e-4)


def _inputs(like: Tensor) -> Tensor:
    """Return (2, 3, d): a module that takes another dimension for the features does not get through."""
    return random((2, 3, len(like)), like.device)


def random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return whole numbers from −3 to 3, whose products float32 adds up with no rounding."""
    device = torch.device("cpu") if device.type == "meta" else device
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).to(device, torch.float32)
