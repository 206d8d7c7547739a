"""Modules of any type that compute a known map with one weight: found by trying them, or named by `register`."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from brandla import _check
from brandla.kfac.capture.kinds.kind import Kind, why_left
from brandla.kfac.capture.kinds.linear import LinearKind
from brandla.kfac.capture.kinds.norm import NormKind
from brandla.kfac.capture.kinds.probe import Names, find_like, unit_and_zero
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
    names = Names.of(module)
    if like is None or names is None:
        return None
    return why_left(module, names.weight) or [_KINDS[like](module, *names)]


def tried(module: nn.Module) -> list[Kind] | str | None:
    """Return the weight of a module that computes a known map; None for others."""
    names = Names.of(module)
    if names is None:
        return None
    if reason := why_left(module, names.weight):
        return reason
    like = find_like(module, names)
    return None if like is None else [_KINDS[like](module, *names)]


class TransposedKind(LinearKind):
    """x weight + bias, as the ``Conv1D`` of transformers computes it."""

    leaves_out = False
    transposed = True

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        d_in, d_out = self.weight.shape
        return (), d_out, d_in


class ScaleKind(NormKind):
    """weight · x̂ + bias in each channel of the last dimension, such as RMSNorms of any package.

    x̂ is what the module itself gives with weights 1, less what it gives with weights 0.
    """

    def __init__(self, module: nn.Module, weight: str, bias: str) -> None:
        super().__init__(module, weight, bias)
        self.may_lead = True

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        if output.shape != inputs.shape or inputs.shape[-1:] != self.weight.shape:
            return f"its input has shape {tuple(inputs.shape)} and its output {tuple(output.shape)}"
        return ""

    def _normalised(self, inputs: Tensor) -> Tensor:
        """Return x̂."""
        unit, zero = unit_and_zero(self.module, self._weight, inputs)
        difference: Tensor = unit - zero
        return difference


_KINDS: dict[str, Any] = {"linear": LinearKind, "transposed": TransposedKind, "scale": ScaleKind}
