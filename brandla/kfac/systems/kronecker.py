"""The curvature of a layer as a Kronecker product A ⊗ G, and lists of layers fed and solved together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from torch import Tensor

from brandla import grouped
from brandla.damped import LowRank
from brandla.kfac.systems.factor import Factor, Intake, absorb_columns, damped_solves, shifts_of_each
from brandla.kfac.systems.form import Blocks, Diagonal, FactorForm, State
from brandla.kfac.systems.strategy import Curvature, Problem, Strategy
from brandla.kfac.values import Damping, Gradient, Now, Rows, Shape, Side, alike

SIDES: tuple[Side, Side] = ("output", "input")


@dataclass(frozen=True)
class Kronecker(Curvature):
    """Factors A (d_in, d_in) of the inputs and G (d_out, d_out) of the output gradients; None stands for I, undamped.

    A is the mean of a aᵀ over uses; G is the mean of g gᵀ, g being the gradient of one term of a loss that is a mean
    over uses (``docs/kfac.md``). A ``single`` layer's only factor is the mean of g gᵀ, g being its whole gradient.
    """

    input: Factor | None
    output: Factor | None

    @classmethod
    def of(cls, shape: Shape, strategy: FactorForm) -> Kronecker:
        """Return the curvature of a layer before any data; an input factor of a known simple form is exact."""
        of_inputs = Diagonal() if shape.one_hot else Blocks() if shape.single else strategy
        output = None if shape.single else Factor(shape.d_out, shape, strategy)
        return cls(Factor(shape.d_in, shape, of_inputs), output)

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
            found.append((self.input, inputs, rows.uses if rows.single else 1 / rows.uses))
        if self.output is not None:
            found.append((self.output, rows.gradients.mT, rows.uses))
        return found

    def parts(self) -> State:
        return {side: own.parts() for side, own in self.sides}

    def loaded(self, state: dict[str, Any], where: str) -> Kronecker:
        sides: dict[str, Any] = {side: own.loaded(state[side], f"{where} ({side})") for side, own in self.sides}
        return replace(self, **sides)


def solve_together(problems: Sequence[Problem], damping: Damping) -> list[Gradient]:
    """Return (G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹ of each problem, all sides of pairs together, and all of matrices."""
    gradients = [problem.gradient for problem in problems]
    sides = [dict(problem.curvature.factors()) for problem in problems]

    def is_at_once(index: int) -> bool:
        """Whether there is a matrix, and two factors of a low-rank form."""
        own = sides[index].values()
        return isinstance(gradients[index], Tensor) and len(own) == 2 and None not in [one.rank for one in own]

    def together(indices: list[int]) -> Sequence[Gradient]:
        own, factors = [gradients[index] for index in indices], [sides[index] for index in indices]
        if not is_at_once(indices[0]):
            return _from_each_side(own, factors, damping)
        left, right = ([of_layer[side] for of_layer in factors] for side in SIDES)
        of_left, of_right = ([cast(LowRank, factor.operand()) for factor in those] for those in (left, right))
        left_tail, right_tail = ([factor.strategy.tail for factor in those] for those in (left, right))
        both = shifts_of_each(left + right, damping)
        shifts = both[: len(left)], both[len(left) :]
        return grouped.kron_damped_solve(of_left, of_right, own, *shifts, left_tail=left_tail, right_tail=right_tail)

    return alike(range(len(problems)), is_at_once, together)


def _from_each_side(
    gradients: Sequence[Gradient], sides: Sequence[Mapping[Side, Factor]], damping: Damping
) -> list[Gradient]:
    """Solve with the factors there are: matrices from the left and then from the right, both sides of pairs at once."""
    # W or P for the factor of the outputs, and Q for that of the inputs, which gets what came of W after it.
    blocks: dict[tuple[int, Side], Tensor] = {}
    for at, own in enumerate(gradients):
        if isinstance(own, Tensor):
            blocks[at, "output"] = own
        else:
            # In the order in which factors take data in: small parts of theirs are then stacked without a copy.
            blocks[at, "input"], blocks[at, "output"] = own[1], own[0]
    solved = damped_solves([sides[at].get(side) for at, side in blocks], list(blocks.values()), damping)
    found = dict(zip(blocks, solved, strict=True))
    matrices = [at for at, own in enumerate(gradients) if isinstance(own, Tensor)]
    after = damped_solves(
        [sides[at].get("input") for at in matrices], [found[at, "output"].mT for at in matrices], damping
    )
    steps = dict(zip(matrices, after, strict=True))
    return [steps[at].mT if at in steps else (found[at, "output"], found[at, "input"]) for at in range(len(gradients))]


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
