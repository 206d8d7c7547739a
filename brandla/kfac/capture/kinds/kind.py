"""What the loop asks of a type of module."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor, nn

# Called at each use of a weight with the kind that makes rows of this call, its input and its output. What it returns
# takes the place of the output.
Record: TypeAlias = "Callable[[Kind, Any, Any], Any]"


class Uses(NamedTuple):
    """Inputs (*groups, samples, positions, d_in) and output gradients (..., d_out) of one call.

    ``ones`` (..., 1) is the bias's input, where that is not 1 everywhere.
    """

    inputs: Tensor
    gradients: Tensor
    ones: Tensor | None = None


class Kind:
    """One weight of a module, with the bias that is added to what it gives: here a matrix that rows are multiplied by.

    The weight is a matrix (*groups, d_out, d_in) to the loop: a row of inputs times it, and the bias, is a row of
    outputs, in each group by itself.
    """

    # The types of modules with one weight of this kind, called as those types are.
    types: ClassVar[tuple[type[Any], ...]] = ()
    # Inputs are indices of one-hot vectors.
    one_hot = False
    # A use's input is the gradient of the whole (weight, bias) row, and there are no output gradients.
    single = False
    # The step may be applied to the pair of inputs and output gradients.
    pairs = True
    # The matrix is the weight transposed.
    transposed = False
    # Inputs and output gradients have changed places: the rows are of the transposed use of the weight.
    turned = False
    # The module is called once for each use, and autograd may be told not to form the weight's gradient.
    leaves_out = False
    # The one that is meant of several weights that lie in the parameter.
    index: int | None = None
    # Weights that lie one after the other in the tensor, each of so many groups: their steps are clipped apart.
    weights = 1
    # Positions may come before samples: inputs and outputs differ in the dimensions after both alone.
    may_lead = False
    # Calls are given with positions before samples, whatever the module's own order is.
    positions_first = False
    # Positions (samples, positions) that are no padding, where the call itself tells.
    valid: Tensor | None = None
    # What tells this weight from others of its module, in the layer's name, and that name.
    part = ""
    name = ""

    def __init__(self, module: nn.Module, weight: str = "weight", bias: str = "bias") -> None:
        self.module: Any = module
        self._weight = weight
        # Empty, where the bias is left to another weight.
        self.bias_name = bias

    @classmethod
    def of(cls, module: nn.Module) -> list[Kind] | str | None:
        """Return the weights of a module, or why they are left to the optimizer; None if it is of no such kind."""
        if not isinstance(module, cls.types):
            return None
        return own_forward(module, *cls.types) or cls.left(module) or why_left(module, "weight") or [cls(module)]

    @classmethod
    def left(cls, module: Any) -> str:
        """Say why a module of these types is left to the optimizer; an empty string if it is not."""
        return ""

    @property
    def weight(self) -> Any:
        """The weight as it is now: a sharded one may be another tensor in a forward pass."""
        # What nn.Module.__getattr__ would find first, without that call.
        own = self.module._parameters.get(self._weight)
        return getattr(self.module, self._weight) if own is None else own

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if it is trained."""
        bias: nn.Parameter | None = self.module._parameters.get(self.bias_name)
        if bias is None and self.bias_name:
            bias = getattr(self.module, self.bias_name, None)
        return bias if bias is not None and bias.requires_grad else None

    def weight_part(self, weight: Tensor) -> Tensor:
        """Return what is this weight of a tensor of the parameter's shape: a view, to be written to."""
        return weight if self.index is None else weight[self.index]

    @property
    def was_seen(self) -> bool:
        """Whether uses of the parameter have been seen, though none may have been of this part of it."""
        return False

    @property
    def is_averaged(self) -> bool:
        """Whether rows of inputs may be averaged over the positions of a sample."""
        return not (self.one_hot or self.single or self.turned)

    def bias_part(self, bias: Tensor) -> Tensor:
        """Return what belongs to this weight of a tensor of the bias's shape: a view, to be written to."""
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
        """Return one use a sample: inputs averaged and gradients summed over its positions, where that can be."""
        uses = self.uses(inputs, gradient)
        if not self.is_averaged:
            return uses
        return Uses(
            uses.inputs.mean(-2, keepdim=True, dtype=full_dtype(uses.inputs)),
            uses.gradients.sum(-2, keepdim=True, dtype=full_dtype(uses.gradients)),
        )

    def uses_where(self, valid: Tensor, inputs: Tensor, gradient: Tensor) -> tuple[Uses, Tensor]:
        """Return `uses` with those of other positions all 0, and a mask (samples, positions) of the ``valid`` ones."""
        if self.single:
            leading = valid.reshape(gradient.shape[: 1 if gradient.ndim == 2 else 2])
            gradient = gradient.masked_fill(~leading[(..., *[None] * (gradient.ndim - leading.ndim))], 0)
            return self.uses(inputs, gradient), valid.any(-1, keepdim=True)
        found = self.uses(inputs, gradient)
        valid = valid.repeat_interleave(found.gradients.shape[-2] // valid.shape[1], dim=1)
        empty = ~valid[..., None]
        gradients = found.gradients.masked_fill(empty, 0)
        if self.one_hot:
            return Uses(found.inputs.masked_fill(empty, -1), gradients), valid
        # The bias's 1 is one of the inputs.
        ones = torch.ones_like(found.inputs[..., :1]) if found.ones is None else found.ones
        return Uses(found.inputs.masked_fill(empty, 0), gradients, ones.masked_fill(empty, 0)), valid

    def attach(self, record: Record, is_wanted: Callable[[], bool]) -> list[Any]:
        """Have ``record`` called at each use, or where it ``is_wanted`` alone; return handles with ``remove()``."""

        def call(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return record(*self.of_arguments(args, kwargs), output)

        return [self.module.register_forward_hook(OwnHook(self.module, call), with_kwargs=True)]

    def of_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kind, Any]:
        """Return the kind that makes rows of a call of the module, and the input."""
        first = next(iter((*args, *kwargs.values())), None)
        return self.of_call(), first if args else kwargs.get("input", first)

    def of_call(self) -> Kind:
        """Return the kind that makes rows of the call that is going on."""
        return self

    def knowing(self, **parts: Any) -> Self:
        """Return the kind of one call, with what is known of that call alone."""
        own = copy(self)
        vars(own).update(parts)
        return own

    def refusal(self, inputs: Any, output: Any) -> str:
        """Say why a call cannot be made into rows; an empty string if it can."""
        for name, part in (("input", inputs), ("output", output)):
            if not isinstance(part, Tensor):
                return f"its {name} is of type {type(part).__name__}, not a tensor"
            if part.is_nested or part.layout is not torch.strided:
                return f"its {name} is not a dense tensor"
        if not isinstance(self.weight, nn.Parameter):
            return COMPUTED
        return self.misfit(inputs, output)

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        """Say why the shapes of a call are not those that `uses` can take; an empty string if they are."""
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


class OwnHook:
    """A hook that stays with its module: copies, and what is loaded from a file, have one without effect."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module = module
        self._call = call

    def __call__(self, module: nn.Module, *of_call: Any) -> Any:
        """Pass the call on, if it is the module's."""
        # A shallow copy of the module's attributes, as DataParallel makes, takes the hook along.
        return self._call(*of_call) if module is self._module else None

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_nothing,)


def _nothing(*_: Any) -> None:
    """Leave the output of a module as it is."""


COMPUTED = "its weight is computed from other parameters"


def own_forward(module: nn.Module, *types: type[nn.Module]) -> str:
    """Say so where the forward pass of a module is not that of one of these types: a subclass may have its own."""
    own = type(module)
    for kind in types:
        # What a convolution's forward pass calls may be a subclass's own, too.
        parts = [(getattr(own, name, None), getattr(kind, name, None)) for name in ("forward", "_conv_forward")]
        if issubclass(own, kind) and all(one is other for one, other in parts):
            return ""
    return f"{own.__name__} has a forward pass of its own"


def is_leaf(module: nn.Module) -> bool:
    """Say whether no module inside of this one has parameters."""
    return not any(True for child in module.children() for _ in child.parameters())


def why_left(module: nn.Module, *names: str) -> str:
    """Say why weights cannot be preconditioned; an empty string if they can."""
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
    """Return the dtype in which sums of a tensor are taken."""
    return torch.promote_types(part.dtype, torch.float32)


def by_sample(part: Tensor) -> Tensor:
    """Reshape (samples, *positions, d) to (samples, positions, d); a single vector is one sample."""
    if part.ndim <= 2:
        return part.reshape(-1, 1, part.shape[-1])
    return part.reshape(part.shape[0], -1, part.shape[-1])


def wrong_shape(output: Tensor, wanted: tuple[int, ...]) -> str:
    """Say that an output has not the shape that its input makes; an empty string if it has."""
    if output.shape == wanted:
        return ""
    return f"its output has shape {tuple(output.shape)}, where the input makes {wanted}"
