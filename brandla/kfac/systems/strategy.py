"""A K-FAC system as the loop sees it: it makes the curvature of each layer, feeds it, and solves with it."""

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
from brandla.kfac.values import Gradient, Now, Rows, Shape, Side, inner_of_each, scaled, sizes


class Problem(NamedTuple):
    """A layer's gradient to be solved for, with its curvature, and the rows of the step where they were captured.

    ``weight`` returns the layer's weights as they are now, as a matrix. ``reduced`` says that the factors are made of
    averages and sums over positions, which the gradient is not.
    """

    curvature: Curvature
    gradient: Gradient
    rows: Rows | None
    weight: Callable[[], Tensor] | None = None
    reduced: bool = False


# For reports: one side of a layer where that is no factor, a remark, and what it keeps.
Kept: TypeAlias = tuple[Side, str, list[Tensor]]


class Curvature(ABC):
    """The curvature of one layer: its state, and the two things done with it, `absorb` and `solve`."""

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether data came in."""

    @abstractmethod
    def absorb(self, rows: Rows, now: Now) -> None:
        """Take in the rows of a step, and renew the parts that are due."""

    @abstractmethod
    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return the preconditioned gradient, a pair for a pair or else a matrix."""

    def widest_pair(self, entries: int) -> int | None:
        """Return k up to which a pair (d_out, k), (d_in, k) is cheaper to solve for than its d_out d_in ``entries``.

        None where the curvature is not applied to pairs.
        """
        return None

    def factors(self) -> Iterator[tuple[Side, Factor]]:
        """Go through the Kronecker factors, where there are any."""
        return iter(())

    def kept(self) -> Iterator[Kept]:
        """Go through the sides, where there are no factors."""
        return iter(())

    @abstractmethod
    def parts(self) -> State:
        """Return the state: numbers, strings and tensors by their names."""

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
    """A curvature that is one state by names, without data an empty one."""

    # What reads a state, for its messages.
    loader: ClassVar[str] = "KFAC.load_state_dict"
    # Parts in float64, whatever the layer's dtype is.
    in_float64: ClassVar[tuple[str, ...]] = ()
    # For reports: the names of what each side keeps, if that is told apart, and a remark.
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
        """Return the shapes that tensors of a saved state have to have."""

    def loaded(self, state: dict[str, Any], where: str) -> Self:
        for name, wanted in self.sizes(state).items():
            check_shape(state[name], wanted, f"{where}: {name}", function=self.loader)
        own = dict(state)
        for name, part in state.items():
            if isinstance(part, Tensor):
                dtype = torch.float64 if name in self.in_float64 else self.shape.dtype
                own[name] = part.to(self.shape.device, dtype if part.is_floating_point() else part.dtype, copy=True)
        return replace(self, state=own)


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """One system of the K-FAC family.

    ``str()`` of it names it in checkpoints and reports. Options that are functions of the step are spelled by their
    qualified name there: a checkpoint is continued by the function of the same name.
    """

    # Whether `solve` reads the rows of the step, which every process then needs.
    reads_rows: ClassVar[bool] = False
    # Whether `second_pass` is of any use.
    takes_second_pass: ClassVar[bool] = False
    # Whether ⟨step, ∂W⟩ is the squared length of the step in the metric of the curvature.
    measures_length: ClassVar[bool] = True

    __str__ = spelled

    @abstractmethod
    def curvature(self, shape: Shape) -> Curvature:
        """Return the curvature of a layer before any data."""

    def absorb(self, curvatures: Sequence[Curvature], rows: Sequence[Rows], now: Now) -> None:
        """Take the rows of a step into the curvatures of all layers of this strategy."""
        for index, (curvature, own) in enumerate(zip(curvatures, rows, strict=True)):
            curvature.absorb(own, now._replace(seed=now.seed + index))

    def steps(self, problems: Sequence[Problem], now: Now) -> list[Gradient]:
        """Return the steps of all layers: each matrix of reduced factors at relative damping shortened to a bound.

        ⟨step, ∂W⟩ is at most min(d_out, d_in) / (1 − ρ) then. Of one batch, ∂W = Γᵀ X has ⟨(G + λ)⁻¹ ∂W (A + λ)⁻¹, ∂W⟩
        <= min(d_out, d_in), whatever λ is, since G = N Γᵀ Γ and A = Xᵀ X / N; and of an average the latest batch is a
        share of 1 − ρ or more. Sums over positions may cancel where the gradient does not: then G is rounding, and says
        nothing of the length of a step.
        """
        steps = self.solve(problems, now)
        if self.measures_length and now.damping.scale == "relative":
            for index, (step, problem) in enumerate(zip(steps, problems, strict=True)):
                if problem.reduced:
                    length = inner_of_each(step, problem.gradient).abs() * (1 - now.decay)
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
