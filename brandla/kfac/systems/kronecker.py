"""The curvature of a layer as a Kronecker product A ⊗ G, and lists of layers fed and solved together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from torch import Tensor

from brandla import grouped
from brandla.damped import LowRank
from brandla.kfac.systems.diagonal import Blocks, Diagonal
from brandla.kfac.systems.factor import Factor, Intake, absorb_columns, damped_solves, shifts_of_each
from brandla.kfac.systems.form import FactorForm
from brandla.kfac.systems.strategy import Curvature, Problem, Strategy
from brandla.kfac.values import Damping, Gradient, Now, Rows, Shape, Side


@dataclass(frozen=True)
class Kronecker(Curvature):
    """Factors A (d_in, d_in) of the inputs and G (d_out, d_out) of the output gradients; None stands for I, undamped.

    A is the mean of a aᵀ over uses; G is the mean of g gᵀ, g being the gradient of one term of a loss that is a mean
    over uses (``docs/kfac.md``). A ``single`` layer's only factor is the mean of g gᵀ, g being its whole gradient.
    """

    input: Factor | None
    output: Factor | None
    single: bool = False

    @classmethod
    def of(cls, shape: Shape, strategy: FactorForm) -> Kronecker:
        """Return the curvature of a layer before any data."""

        def fresh(n: int, asked: FactorForm) -> Factor:
            return Factor(n, shape.groups, asked, shape.dtype, shape.device)

        return cls(
            fresh(shape.d_in, _of_inputs(shape, strategy)),
            None if shape.single else fresh(shape.d_out, strategy),
            shape.single,
        )

    @cached_property
    def sides(self) -> list[tuple[Side, Factor]]:
        """The factors there are, by their side."""
        sides: tuple[tuple[Side, Factor | None], ...] = (("input", self.input), ("output", self.output))
        return [(side, own) for side, own in sides if own is not None]

    @property
    def started(self) -> bool:
        return not [own for _, own in self.sides if not own.state]

    def absorb(self, rows: Rows, now: Now) -> None:
        absorb_columns(self.intakes(rows), now)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return (G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹."""
        return solve_together([Problem(self, gradient, None)], now.damping)[0]

    def widest_pair(self, entries: int) -> int | None:
        """Compare 4 k Σ n r flops, and 2 k d_out d_in for the product then, with 4 d_out d_in Σ r."""
        ranks, of_column = 0, 2 * entries
        for _, own in self.sides:
            rank = own.rank
            if rank is None:
                return None
            ranks += rank
            of_column += 4 * own.n * rank
        return 4 * entries * ranks // of_column if ranks else None

    def factors(self) -> Iterator[tuple[Side, Factor]]:
        return iter(self.sides)

    def intakes(self, rows: Rows) -> list[Intake]:
        """Return the columns that each factor gets of the rows."""
        found: list[Intake] = []
        if self.input is not None:
            inputs = rows.inputs.mT if rows.inputs.is_floating_point() else rows.inputs
            found.append((self.input, inputs, rows.uses if self.single else 1 / rows.uses))
        if self.output is not None:
            found.append((self.output, rows.gradients.mT, rows.uses))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {side: own.state_dict() for side, own in self.sides}

    def loaded(self, state: dict[str, Any], where: str) -> Kronecker:
        sides: dict[str, Any] = {side: own.loaded(state[side], f"{where} ({side})") for side, own in self.sides}
        return replace(self, **sides)

    def tensors(self) -> Iterator[Tensor]:
        for _, own in self.sides:
            yield from own.tensors()


def _of_inputs(shape: Shape, strategy: FactorForm) -> FactorForm:
    """Return the strategy of an input factor, or the exact one where its form is known to be simple."""
    if shape.one_hot:
        return Diagonal(tail=0.0)
    return Blocks(tail=0.0) if shape.single else strategy


def solve_together(problems: Sequence[Problem], damping: Damping) -> list[Gradient]:
    """Return (G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹ of each problem, all sides of pairs together, and all of matrices."""
    products = {
        index: product
        for index, problem in enumerate(problems)
        if isinstance(problem.gradient, Tensor) and (product := _product(problem))
    }
    others = {index: problem for index, problem in enumerate(problems) if index not in products}
    solved = dict(zip(others, _from_each_side(list(others.values()), damping), strict=True))
    if products:
        left, right, of_left, of_right = (list(part) for part in zip(*products.values(), strict=True))
        shifts = shifts_of_each(left + right, damping)
        steps = grouped.kron_damped_solve(
            of_left,
            of_right,
            [problems[index].gradient for index in products],
            shifts[: len(left)],
            shifts[len(left) :],
            left_tail=[own.strategy.tail for own in left],
            right_tail=[own.strategy.tail for own in right],
        )
        solved |= dict(zip(products, steps, strict=True))
    return [solved[index] for index in range(len(problems))]


def _product(problem: Problem) -> tuple[Factor, Factor, LowRank, LowRank] | None:
    """Return both factors of a problem, and their low-rank forms; None if one has none."""
    curvature = _of(problem)
    if curvature.input is None or curvature.output is None:
        return None
    left, right = curvature.output.operand(), curvature.input.operand()
    return None if left is None or right is None else (curvature.output, curvature.input, left, right)


def _from_each_side(problems: Sequence[Problem], damping: Damping) -> list[Gradient]:
    """Solve with the factors there are: matrices from the left and then from the right, both sides of pairs at once."""
    steps = [problem.gradient for problem in problems]
    sides = [(index, *own) for index, problem in enumerate(problems) for own in _of(problem).sides]
    waiting = [name == "input" and isinstance(steps[index], Tensor) for index, name, _ in sides]
    for turn in (False, True):
        taken = [side for side, waits in zip(sides, waiting, strict=True) if waits is turn]
        blocks = [_block(steps[index], name) for index, name, _ in taken]
        solved = damped_solves([factor for *_, factor in taken], blocks, damping)
        for (index, name, _), block in zip(taken, solved, strict=True):
            steps[index] = _with_block(steps[index], name, block)
    return steps


def _of(problem: Problem) -> Kronecker:
    return cast(Kronecker, problem.curvature)


def _block(step: Gradient, side: Side) -> Tensor:
    """Return the block for a factor: W or P on the side of the outputs, Wᵀ or Q on that of the inputs."""
    if isinstance(step, Tensor):
        return step if side == "output" else step.mT
    return step[side == "input"]


def _with_block(step: Gradient, side: Side, block: Tensor) -> Gradient:
    if isinstance(step, Tensor):
        return block if side == "output" else block.mT
    return (block, step[1]) if side == "output" else (step[0], block)


@dataclass(frozen=True, kw_only=True)
class KroneckerStrategy(Strategy):
    """A system whose curvatures are all `Kronecker`: the factors of all its layers are fed and solved together."""

    def absorb(self, curvatures: Sequence[Curvature], rows: Sequence[Rows], now: Now) -> None:
        """Take the rows of all layers into their factors, so that a GPU is asked once for all of a size."""
        both = zip(cast(Sequence[Kronecker], curvatures), rows, strict=True)
        absorb_columns([intake for curvature, own in both for intake in curvature.intakes(own)], now)

    def solve(self, problems: Sequence[Problem], now: Now) -> list[Gradient]:
        return solve_together(problems, now.damping)


@dataclass(frozen=True, kw_only=True)
class FactorStrategy(FactorForm, KroneckerStrategy):
    """A system that keeps each Kronecker factor by itself, in one form."""

    def curvature(self, shape: Shape) -> Curvature:
        """Return a Kronecker product of two factors of this form."""
        return Kronecker.of(shape, self)
