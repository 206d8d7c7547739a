"""The curvature of a layer as a Kronecker product A ⊗ G, and functions that solve for many layers together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from torch import Tensor

from brandla import grouped
from brandla.damped import LowRank
from brandla.kfac.systems.factor import Factor, Intake, absorb_columns, damped_solves, dampings_of_each
from brandla.kfac.systems.form import Blocks, Diagonal, FactorForm, State
from brandla.kfac.systems.strategy import Curvature, Problem, Strategy
from brandla.kfac.values import Damping, Gradient, Now, Rows, Shape, Side, map_by_kind

SIDES: tuple[Side, Side] = ("output", "input")


@dataclass(frozen=True)
class Kronecker(Curvature):
    """Factors A (d_in, d_in) of the inputs and G (d_out, d_out) of the output gradients; None stands for I, undamped.

    A is the mean of a aᵀ over uses. G is the mean of g gᵀ, where g is the gradient of one term of a loss that is a mean
    over uses (``docs/kfac.md``). A ``single`` layer's only factor is the mean of g gᵀ, where g is its whole gradient.
    """

    input: Factor | None
    output: Factor | None

    @classmethod
    def of(cls, shape: Shape, strategy: FactorForm) -> Kronecker:
        """Return the curvature of a layer before any data. Diagonal and small input factors are kept exactly."""
        of_inputs = Diagonal() if shape.one_hot else Blocks() if shape.single else strategy
        output = None if shape.single else Factor(shape.d_out, shape, strategy)
        return cls(Factor(shape.d_in, shape, of_inputs), output)

    @cached_property
    def sides(self) -> list[tuple[Side, Factor]]:
        """The factors that exist, with their sides."""
        sides: tuple[tuple[Side, Factor | None], ...] = (("input", self.input), ("output", self.output))
        return [(side, factor) for side, factor in sides if factor is not None]

    @property
    def started(self) -> bool:
        return not [factor for _, factor in self.sides if not factor.state]

    def absorb(self, rows: Rows, now: Now) -> None:
        absorb_columns(self.intakes(rows), now)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return (G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹."""
        return solve_together([Problem(self, gradient, None)], now.damping)[0]

    def widest_pair(self, entries: int) -> int | None:
        """Return the k at which a pair's flops, 4 k Σ n r + 2 k d_out d_in, equal a matrix's, 4 d_out d_in Σ r."""
        ranks, of_column = 0, 2 * entries
        for _, factor in self.sides:
            rank = factor.rank
            if rank is None:
                return None
            ranks += rank
            of_column += 4 * factor.n * rank
        return 4 * entries * ranks // of_column if ranks else None

    def factors(self) -> Iterator[tuple[Side, Factor]]:
        return iter(self.sides)

    def intakes(self, rows: Rows) -> list[Intake]:
        """Return each factor with its columns from the rows, and their scale."""
        intakes: list[Intake] = []
        if self.input is not None:
            inputs = rows.inputs.mT if rows.inputs.is_floating_point() else rows.inputs
            intakes.append((self.input, inputs, rows.uses if rows.single else 1 / rows.uses))
        if self.output is not None:
            intakes.append((self.output, rows.gradients.mT, rows.uses))
        return intakes

    def parts(self) -> State:
        return {side: factor.parts() for side, factor in self.sides}

    def loaded(self, state: dict[str, Any], where: str) -> Kronecker:
        sides: dict[str, Any] = {side: factor.loaded(state[side], f"{where} ({side})") for side, factor in self.sides}
        return replace(self, **sides)


def solve_together(problems: Sequence[Problem], damping: Damping) -> list[Gradient]:
    """Return (G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹ of each problem; two low-rank factors solve a matrix jointly."""
    gradients = [problem.gradient for problem in problems]
    sides = [dict(problem.curvature.factors()) for problem in problems]

    def has_joint_solve(index: int) -> bool:
        """Whether the gradient is a matrix, and there are two factors in low-rank form."""
        factors = sides[index].values()
        return isinstance(gradients[index], Tensor) and len(factors) == 2 and None not in [own.rank for own in factors]

    def solve_kind(indices: list[int]) -> Sequence[Gradient]:
        chosen, factors = [gradients[index] for index in indices], [sides[index] for index in indices]
        if not has_joint_solve(indices[0]):
            return _solve_each_side(chosen, factors, damping)
        left, right = ([of_layer[side] for of_layer in factors] for side in SIDES)
        of_left, of_right = ([cast(LowRank, factor.operand()) for factor in of_side] for of_side in (left, right))
        left_tail, right_tail = ([factor.form.tail for factor in of_side] for of_side in (left, right))
        both = dampings_of_each(left + right, damping)
        shifts = both[: len(left)], both[len(left) :]
        return grouped.kron_damped_solve(of_left, of_right, chosen, *shifts, left_tail=left_tail, right_tail=right_tail)

    return map_by_kind(range(len(problems)), has_joint_solve, solve_kind)


def _solve_each_side(
    gradients: Sequence[Gradient], sides: Sequence[Mapping[Side, Factor]], damping: Damping
) -> list[Gradient]:
    """Solve with the factors that exist: matrices from the left and then the right, both sides of pairs at once."""
    # The output factor gets ∂W or P, and the input factor Q. The input factors of matrices follow in a second call.
    blocks: dict[tuple[int, Side], Tensor] = {}
    for index, gradient in enumerate(gradients):
        if isinstance(gradient, Tensor):
            blocks[index, "output"] = gradient
        else:
            # Factors take in data in this order, so their small parts are stacked without a copy.
            blocks[index, "input"], blocks[index, "output"] = gradient[1], gradient[0]
    solutions = damped_solves([sides[index].get(side) for index, side in blocks], list(blocks.values()), damping)
    solved = dict(zip(blocks, solutions, strict=True))
    matrices = [index for index, gradient in enumerate(gradients) if isinstance(gradient, Tensor)]
    right = [solved[index, "output"].mT for index in matrices]
    after = damped_solves([sides[index].get("input") for index in matrices], right, damping)
    steps = dict(zip(matrices, after, strict=True))
    return [steps[i].mT if i in steps else (solved[i, "output"], solved[i, "input"]) for i in range(len(gradients))]


@dataclass(frozen=True, kw_only=True)
class KroneckerStrategy(Strategy):
    """A system whose curvatures are all `Kronecker`: all layers' factors take in data and are solved together."""

    def absorb(self, curvatures: Sequence[Curvature], rows: Sequence[Rows], now: Now) -> None:
        """Take the rows of all layers into their factors together: low-rank updates of equal r and k share launches."""
        both = zip(cast(Sequence[Kronecker], curvatures), rows, strict=True)
        absorb_columns([intake for curvature, of_layer in both for intake in curvature.intakes(of_layer)], now)

    def solve(self, problems: Sequence[Problem], now: Now) -> list[Gradient]:
        return solve_together(problems, now.damping)


@dataclass(frozen=True, kw_only=True)
class FactorStrategy(FactorForm, KroneckerStrategy):
    """A system that keeps each Kronecker factor separately, in one form."""

    def curvature(self, shape: Shape) -> Curvature:
        """Return a Kronecker product of two factors of this form."""
        return Kronecker.of(shape, self)
