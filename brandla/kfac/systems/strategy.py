"""The interface of a K-FAC system: it makes the curvature of each layer, takes in data, and solves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from brandla import _check
from brandla.kfac.systems.factor import Factor
from brandla.kfac.systems.form import State, check_shape, tensors_of
from brandla.kfac.systems.schedule import spelled
from brandla.kfac.values import Gradient, Now, Rows, Shape, Side, inner_products, scaled, sizes


class Problem(NamedTuple):
    """A layer's gradient to be preconditioned, with its curvature, and the rows of the step if they were captured.

    ``weight`` returns the layer's current weights as a matrix. ``reduced`` means that the factors, unlike the gradient,
    are made of averages and sums over positions.
    """

    curvature: Curvature
    gradient: Gradient
    rows: Rows | None
    weight: Callable[[], Tensor] | None = None
    reduced: bool = False


# For reports: a side of a layer without a factor, a remark, and the tensors that the side keeps.
Kept: TypeAlias = tuple[Side, str, list[Tensor]]


class Curvature(ABC):
    """The curvature of one layer: its state, and the two things done with it, `absorb` and `solve`."""

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether the curvature has taken in data."""

    @abstractmethod
    def absorb(self, rows: Rows, now: Now) -> None:
        """Take in the rows of a step, and renew parts that are due."""

    @abstractmethod
    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return the preconditioned gradient: a matrix, or a pair if the gradient is a pair."""

    def widest_pair(self, entries: int) -> int | None:
        """Return the largest k at which solving for a pair (d_out, k), (d_in, k) is cheaper than for the whole matrix.

        ``entries`` is d_out d_in. None if the curvature is not applied to pairs.
        """
        return None

    def factors(self) -> Iterator[tuple[Side, Factor]]:
        """Iterate over the Kronecker factors, if any."""
        return iter(())

    def kept(self) -> Iterator[Kept]:
        """Iterate over the sides, if there are no factors."""
        return iter(())

    @abstractmethod
    def parts(self) -> State:
        """Return the state: named numbers, strings and tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state with copies of its tensors."""
        return cast(State, tree_map_only(Tensor, Tensor.clone, self.parts()))

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the state, to count its memory."""
        return tensors_of(self.parts())

    @abstractmethod
    def loaded(self, state: dict[str, Any], where: str) -> Curvature:
        """Return a new curvature of this kind that continues from ``state``, or raise ValueError naming ``where``."""


@dataclass
class StateCurvature(Curvature):
    """A curvature whose parts are all in one state, which is empty before any data."""

    # The name of the function in error messages about a saved state.
    loader: ClassVar[str] = "KFAC.load_state_dict"
    # Parts in float64, whatever the layer's dtype is.
    in_float64: ClassVar[tuple[str, ...]] = ()
    # For reports: the names of each side's parts, if parts belong to sides, and a remark.
    of_sides: ClassVar[Mapping[Side, Sequence[str]]] = {}
    remark: ClassVar[str] = ""

    shape: Shape
    state: State = field(default_factory=dict, kw_only=True)

    @property
    def started(self) -> bool:
        return bool(self.state)

    def kept(self) -> Iterator[Kept]:
        for side, names in self.of_sides.items():
            yield side, self.remark, [self.state[name] for name in names if name in self.state]

    def parts(self) -> State:
        return self.state

    @abstractmethod
    def sizes(self, state: dict[str, Any]) -> Mapping[str, Sequence[int]]:
        """Return the shapes that the tensors of a saved state must have."""

    def loaded(self, state: dict[str, Any], where: str) -> Self:
        for name, wanted in self.sizes(state).items():
            check_shape(state[name], wanted, f"{where}: {name}", function=self.loader)
        loaded = dict(state)
        for name, part in state.items():
            if isinstance(part, Tensor):
                dtype = torch.float64 if name in self.in_float64 else self.shape.dtype
                loaded[name] = part.to(self.shape.device, dtype if part.is_floating_point() else part.dtype, copy=True)
        return replace(self, state=loaded)


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """One system of the K-FAC family.

    Its ``str()`` is its name in checkpoints and reports. It shows a function of the step by its qualified name, so a
    checkpoint must be continued with a function of the same name.
    """

    # Whether `solve` reads the rows of the step. If so, every process needs the rows.
    reads_rows: ClassVar[bool] = False
    # Whether the system uses `second_pass`.
    takes_second_pass: ClassVar[bool] = False
    # Whether ⟨step, ∂W⟩ is the squared length of the step in the metric of the curvature.
    measures_length: ClassVar[bool] = True

    __str__ = spelled

    @abstractmethod
    def curvature(self, shape: Shape) -> Curvature:
        """Return the curvature of a layer before any data."""

    def absorb(self, curvatures: Sequence[Curvature], rows: Sequence[Rows], now: Now) -> None:
        """Take the rows of a step into the curvatures of all layers of this strategy."""
        for index, (curvature, of_layer) in enumerate(zip(curvatures, rows, strict=True)):
            curvature.absorb(of_layer, now._replace(seed=now.seed + index))

    def steps(self, problems: Sequence[Problem], now: Now) -> list[Gradient]:
        """Return the steps of all layers. With reduced factors and relative damping, steps that are too long shrink.

        ⟨step, ∂W⟩ of each matrix is at most min(d_out, d_in) / (1 − ρ) then. For one batch, ∂W = Γᵀ X, G = N Γᵀ Γ and
        A = Xᵀ X / N, so ⟨(G + λ)⁻¹ ∂W (A + λ)⁻¹, ∂W⟩ <= min(d_out, d_in) for every λ. In an average, the latest batch
        has a share of at least 1 − ρ. Sums over positions may cancel even if the gradient does not: then G is only
        rounding, and does not limit the length of a step.
        """
        steps = self.solve(problems, now)
        if self.measures_length and now.damping.scale == "relative":
            for index, (step, problem) in enumerate(zip(steps, problems, strict=True)):
                if problem.reduced:
                    length = inner_products(step, problem.gradient).abs() * (1 - now.decay)
                    factor = (min(sizes(problem.gradient)) / length).clamp(max=1)
                    steps[index] = scaled(step, factor[..., None, None])
        return steps

    def solve(self, problems: Sequence[Problem], now: Now) -> list[Gradient]:
        """Return the preconditioned gradients of all layers of this strategy."""
        return [problem.curvature.solve(problem.gradient, now) for problem in problems]

    def second_pass(self, problems: Sequence[Problem], now: Now) -> None:
        """Take in the gradients and rows of the same batch after the optimizer's step."""
        raise NotImplementedError


def check_inner(strategy: Strategy, inner: object, kind: type[Any], wanted: str) -> None:
    """Check that a strategy wraps an instance of ``kind``."""
    if not isinstance(inner, kind):
        got = inner.__name__ if isinstance(inner, type) else type(inner).__name__
        _check.fail_type(type(strategy).__name__, f"inner must be {wanted}; got {got}")
