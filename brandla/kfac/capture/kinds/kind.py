"""The base class of kinds: what the loop asks of one weight of a module."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor, nn

# Called at each use of a weight with the call's kind, input and output. The result replaces the output.
Record: TypeAlias = "Callable[[Kind, Any, Any], Any]"


class Uses(NamedTuple):
    """Inputs (*groups, samples, positions, d_in) and output gradients (..., d_out) of one call.

    ``ones`` (..., 1) is the bias's input, if it is not 1 everywhere.
    """

    inputs: Tensor
    gradients: Tensor
    ones: Tensor | None = None


class Kind:
    """One weight of a module and the bias added to its output. The base class is a matrix that multiplies rows.

    For the loop, the weight is a matrix (*groups, d_out, d_in). In each group, it maps a row of inputs to a row of
    outputs, to which the bias is added.
    """

    # The types of modules that have one weight of this kind.
    types: ClassVar[tuple[type[Any], ...]] = ()
    # Whether inputs are indices of one-hot vectors.
    one_hot = False
    # Whether a use's input is the gradient of the whole (weight, bias) row. Then there are no output gradients.
    single = False
    # Whether the step may be applied to the pair of inputs and output gradients.
    pairs = True
    # Whether the matrix is the weight transposed.
    transposed = False
    # Whether the rows come from a use of the transposed weight: then inputs and output gradients are exchanged.
    uses_transpose = False
    # Whether each use is one call of the module, so that autograd can leave the weight's gradient out.
    can_leave_out = False
    # The index of this weight in a parameter that holds several weights.
    index: int | None = None
    # The number of weights, one after the other in the tensor, that are clipped separately. All have equal shapes.
    weights = 1
    # Whether positions may come before samples, since the weight acts on the last dimensions alone.
    either_order = False
    # Whether calls are recorded with positions before samples, whatever the module's own order is.
    positions_first = False
    # The positions (samples, positions) that are not padding, if the call itself defines them.
    valid: Tensor | None = None
    # The suffix of the layer's name that identifies this weight among others of its module, and the full name.
    part = ""
    name = ""

    def __init__(self, module: nn.Module, weight: str = "weight", bias: str = "bias") -> None:
        self.module: Any = module
        self._weight = weight
        # Empty if the bias belongs to another weight.
        self.bias_name = bias

    @classmethod
    def of(cls, module: nn.Module) -> list[Kind] | str | None:
        """Return the weights of a module, or why they are left to the optimizer; None if the type does not match."""
        if not isinstance(module, cls.types):
            return None
        reason = overridden_forward(module, *cls.types) or cls.why_left(module) or unusable(module, "weight")
        return reason or [cls(module)]

    @classmethod
    def why_left(cls, module: Any) -> str:
        """Return the reason why a module of these types is left to the optimizer; empty if there is none."""
        return ""

    @property
    def weight(self) -> Any:
        """The current weight: a sharded one may be another tensor in a forward pass."""
        # Looks first where nn.Module.__getattr__ looks first, without its cost.
        weight = self.module._parameters.get(self._weight)
        return getattr(self.module, self._weight) if weight is None else weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if it is trained."""
        bias: nn.Parameter | None = self.module._parameters.get(self.bias_name)
        if bias is None and self.bias_name:
            bias = getattr(self.module, self.bias_name, None)
        return bias if bias is not None and bias.requires_grad else None

    def weight_part(self, weight: Tensor) -> Tensor:
        """Return this weight's part of a tensor of the parameter's shape: a view, to be written to."""
        return weight if self.index is None else weight[self.index]

    @property
    def was_seen(self) -> bool:
        """Whether uses of the parameter have been seen, even if none of them was a use of this weight."""
        return False

    @property
    def is_averaged(self) -> bool:
        """Whether rows of inputs may be averaged over the positions of a sample."""
        return not (self.one_hot or self.single or self.uses_transpose)

    def bias_part(self, bias: Tensor) -> Tensor:
        """Return this weight's part of a tensor of the bias's shape: a view, to be written to."""
        return bias

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """Groups, d_out and d_in, without the bias."""
        first, last = self.weight.shape[-2:]
        return ((), last, first) if self.transposed else ((), first, last)

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return the uses of the weight in one call, from its input and the gradient of its output."""
        return Uses(by_sample(inputs), by_sample(gradient))

    def reduced(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return one use a sample: inputs averaged and gradients summed over its positions, if the kind allows it."""
        uses = self.uses(inputs, gradient)
        if not self.is_averaged:
            return uses
        return Uses(
            uses.inputs.mean(-2, keepdim=True, dtype=full_dtype(uses.inputs)),
            uses.gradients.sum(-2, keepdim=True, dtype=full_dtype(uses.gradients)),
        )

    def uses_where(self, valid: Tensor, inputs: Tensor, gradient: Tensor) -> tuple[Uses, Tensor]:
        """Return `uses`, zero at positions that are not ``valid``, and the mask (samples, positions) of valid uses."""
        if self.single:
            leading = valid.reshape(gradient.shape[: 1 if gradient.ndim == 2 else 2])
            gradient = gradient.masked_fill(~leading[(..., *[None] * (gradient.ndim - leading.ndim))], 0)
            return self.uses(inputs, gradient), valid.any(-1, keepdim=True)
        uses = self.uses(inputs, gradient)
        valid = valid.repeat_interleave(uses.gradients.shape[-2] // valid.shape[1], dim=1)
        empty = ~valid[..., None]
        gradients = uses.gradients.masked_fill(empty, 0)
        if self.one_hot:
            return Uses(uses.inputs.masked_fill(empty, -1), gradients), valid
        # The bias's 1 is one of the inputs.
        ones = torch.ones_like(uses.inputs[..., :1]) if uses.ones is None else uses.ones
        return Uses(uses.inputs.masked_fill(empty, 0), gradients, ones.masked_fill(empty, 0)), valid

    def attach(self, record: Record, is_wanted: Callable[[], bool]) -> list[Any]:
        """Have hooks call ``record`` at each use, or only while it ``is_wanted``; return handles with ``remove()``."""

        def call(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return record(*self.of_arguments(args, kwargs), output)

        return [self.module.register_forward_hook(BoundHook(self.module, call), with_kwargs=True)]

    def of_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kind, Any]:
        """Return the kind that makes rows of a call of the module, and the input."""
        first = next(iter((*args, *kwargs.values())), None)
        return self.of_call(), first if args else kwargs.get("input", first)

    def of_call(self) -> Kind:
        """Return the kind that makes rows of the call that is running."""
        return self

    def copy_with(self, **attributes: Any) -> Self:
        """Return a copy for one call, with attributes that hold for this call alone."""
        for_call = copy(self)
        vars(for_call).update(attributes)
        return for_call

    def refusal(self, inputs: Any, output: Any) -> str:
        """Return the reason why a call cannot be made into rows; empty if it can."""
        for name, part in (("input", inputs), ("output", output)):
            if not isinstance(part, Tensor):
                return f"its {name} is of type {type(part).__name__}, not a tensor"
            if part.is_nested or part.layout is not torch.strided:
                return f"its {name} is not a dense tensor"
        if not isinstance(self.weight, nn.Parameter):
            return COMPUTED
        return self.misfit(inputs, output)

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        """Return the reason why `uses` cannot take the shapes of a call; empty if it can."""
        return ""

    def matrix(self, weight: Tensor) -> Tensor:
        """Arrange a tensor of the weight's shape as a matrix (*groups, d_out, d_in)."""
        if self.transposed:
            return weight.mT
        groups, d_out, d_in = self.shape
        return weight.reshape(*groups, d_out, d_in)

    def tensor(self, matrix: Tensor) -> Tensor:
        """Arrange a matrix (*groups, d_out, d_in) in the weight's shape."""
        return matrix.mT if self.transposed else matrix.reshape(self.weight_part(self.weight).shape)


class BoundHook:
    """A hook that works for its own module alone: in a copy of the module it has no effect, also after pickling."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module = module
        self._call = call

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        """Pass the call on if it is a call of the hook's own module."""
        # A shallow copy of the module's attributes, as DataParallel makes, takes the hook along.
        return self._call(*arguments) if module is self._module else None

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_nothing,)


def _nothing(*_: Any) -> None:
    """Leave the output of a module as it is."""


COMPUTED = "its weight is computed from other parameters"


def overridden_forward(module: nn.Module, *types: type[nn.Module]) -> str:
    """Return a reason if the module's forward pass is not that of one of these types; empty if it is."""
    subclass = type(module)
    for base in types:
        # A subclass may also override the method that a convolution's forward pass calls.
        parts = [(getattr(subclass, name, None), getattr(base, name, None)) for name in ("forward", "_conv_forward")]
        if issubclass(subclass, base) and all(one is other for one, other in parts):
            return ""
    return f"{subclass.__name__} has a forward pass of its own"


def is_leaf(module: nn.Module) -> bool:
    """Say whether no module inside this one has parameters."""
    return not any(True for child in module.children() for _ in child.parameters())


def unusable(module: nn.Module, *names: str) -> str:
    """Return the reason why one of these weights cannot be preconditioned; empty if all can."""
    for name in names:
        weight = getattr(module, name)
        if isinstance(weight, nn.parameter.UninitializedParameter):
            return "it has no shape yet: run it once before it is preconditioned"
        if not isinstance(weight, nn.Parameter):
            return COMPUTED
        if not weight.is_floating_point():
            return "its weight is not real"
        if not weight.numel():
            return "its weight is empty"
    return ""


def full_dtype(part: Tensor) -> torch.dtype:
    """Return the dtype in which a tensor is summed."""
    return torch.promote_types(part.dtype, torch.float32)


def by_sample(part: Tensor) -> Tensor:
    """Reshape (samples, *positions, d) to (samples, positions, d); a single vector is one sample."""
    if part.ndim <= 2:
        return part.reshape(-1, 1, part.shape[-1])
    return part.reshape(part.shape[0], -1, part.shape[-1])


def wrong_shape(output: Tensor, wanted: tuple[int, ...]) -> str:
    """Return a reason if the output does not have the shape that its input requires; empty if it has."""
    if output.shape == wanted:
        return ""
    return f"its output has shape {tuple(output.shape)}, but its input requires {wanted}"
