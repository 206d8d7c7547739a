"""What the loop asks of a type of module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

# Called with input and output of each use of a weight; what it returns takes the place of the output.
Record: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Uses(NamedTuple):
    """Inputs (*groups, samples, positions, d_in) and output gradients (..., d_out) of one call."""

    inputs: Tensor
    gradients: Tensor


class Kind(ABC):
    """One weight of a module, with the bias that is added to what it gives.

    The weight is a matrix (*groups, d_out, d_in) to the loop: a row of inputs times it, and the bias, is a row of
    outputs, in each group by itself.
    """

    # Inputs are indices of one-hot vectors.
    one_hot = False
    # A use's input is the gradient of the whole (weight, bias) row, and there are no output gradients.
    single = False

    def __init__(self, module: nn.Module, weight: str = "weight", bias: str = "bias") -> None:
        self.module = module
        self._weight = weight
        self._bias = bias

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module) -> Iterable[Kind]:
        """Return the weights of a module of this kind; nothing for any other module."""

    @property
    def weight(self) -> nn.Parameter:
        """The weight as it is now: a sharded one may be another tensor in a forward pass."""
        return cast(nn.Parameter, getattr(self.module, self._weight))

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if it is trained."""
        bias: nn.Parameter | None = getattr(self.module, self._bias, None)
        return bias if bias is not None and bias.requires_grad else None

    @property
    @abstractmethod
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """Groups, d_out and d_in, without the bias."""

    @abstractmethod
    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return the uses of the weight in one call, from its input and the gradient of its output."""

    def attach(self, record: Record) -> list[Any]:
        """Have ``record`` called at each use, and return handles with ``remove()``."""

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return record(args[0] if args else kwargs["input"], output)

        return [self.module.register_forward_hook(watch, with_kwargs=True)]

    def matrix(self, weight: Tensor) -> Tensor:
        """View a tensor of the weight's shape as a matrix (*groups, d_out, d_in)."""
        groups, d_out, d_in = self.shape
        return weight.reshape(*groups, d_out, d_in)


def is_ready(parameter: object) -> bool:
    """Say whether a parameter has been given its shape."""
    return isinstance(parameter, torch.Tensor) and not isinstance(parameter, nn.parameter.UninitializedParameter)
