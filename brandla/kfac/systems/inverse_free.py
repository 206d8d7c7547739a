"""IKFAC and SINGD: roots of inverse factors, moved by products alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

from torch import Tensor

from brandla import _check
from brandla.kfac.systems.inverse_root import Batch, CountBatch, InverseRoot, Move, RowBatch
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.systems.strategy import Curvature, Kept, Strategy
from brandla.kfac.systems.structures import STRUCTURES, Diagonal, Structure
from brandla.kfac.values import Gradient, Now, Rows, Shape


@dataclass(frozen=True)
class InverseFree(Strategy):
    """IKFAC and SINGD: K and C with K Kᵀ ≈ A⁻¹ and C Cᵀ ≈ G⁻¹, damped, and the step C Cᵀ ∂W K Kᵀ.

    No eigendecomposition, no Cholesky factor, no host sync, and neither A nor G is formed. Every
    ``preconditioner_every`` steps, with A and G of the batch of that step and H_K = KᵀAK, H_C = CᵀGC,

    - ``"singd"``: m_K ← α m_K + ½ (tr(H_C)/d_out · H_K + λ tr(CᵀC)/d_out · KᵀK − I), and m_C likewise;
    - ``"ikfac"``: m_K = ½ (H_K + λ_A KᵀK − I), and m_C likewise with λ_G;

    projected to the structure, then K ← K − β K m_K and C ← C − β C m_C.

    Parameters
    ----------
    structure
        Of K and C: ``"dense"``, ``"diagonal"``, ``"block-diagonal"``, ``"triangular"``, ``"hierarchical"``,
        ``"toeplitz"``, or one of `brandla.kfac.systems.structures`, such as ``BlockDiagonal(64)``. The input side of an
        embedding is diagonal, exactly, whatever is asked for.
    variant
        ``"singd"`` or ``"ikfac"``.
    rate
        β > 0. It replaces 1 − ``decay``: in IKFAC, to O(β²), K Kᵀ moves as the damped inverse of an exponential average
        with weight β.
    momentum
        α of ``"singd"``, in [0, 1); IKFAC has none.
    preconditioner_every
        Steps between updates, or a function of the step.

    Notes
    -----
    Relative damping is λ_A = damping · d₁(A) and λ_G = damping · d₁(G), with the largest eigenvalues d₁. SINGD takes λ
    = λ_A λ_G: the value of (A + λ_A I) ⊗ (G + λ_G I) where there is no curvature. One power iteration per update
    estimates d₁ from below, along the stream, whose average has the ``decay`` of `KFAC`.

    K and C start as the multiples of I at which tr m = 0 for the first batch that is not zero, so a factor's scale
    plays no part. (In SINGD this determines the product of the two, and only the product matters.) β is cut if ‖β m‖_F
    > 1: beyond this, I − β m no longer approximates exp(−β m).

    References
    ----------
    W. Lin and others, "Structured inverse-free natural gradient descent", ICML 2024, arXiv 2312.05705.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, InverseFree
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), InverseFree("diagonal"))
    """

    structure: str | Structure = "dense"
    _: KW_ONLY
    variant: Literal["singd", "ikfac"] = "singd"
    rate: float = 0.01
    momentum: float = 0.5
    preconditioner_every: Schedule[int] = 10

    def __post_init__(self) -> None:
        if isinstance(self.structure, str) and self.structure not in STRUCTURES:
            names = ", ".join(map(repr, STRUCTURES))
            _check.fail_value("InverseFree", f"structure must be one of {names}; got {self.structure!r}")
        if not isinstance(self.structure, (str, Structure)):
            kind = type(self.structure).__name__
            _check.fail_type("InverseFree", f"structure must be a name or a Structure; got {kind}")
        _check.choice("InverseFree", "variant", self.variant, ("singd", "ikfac"))
        if not 0 < self.rate < float("inf"):
            _check.fail_value("InverseFree", f"rate must be finite and > 0; got {self.rate}")
        if not 0 <= self.momentum < 1:
            _check.fail_value("InverseFree", f"momentum must be in [0, 1); got {self.momentum}")
        self.period(0)

    def period(self, step: int) -> int:
        """Return the steps between updates, as of this step."""
        every = at(self.preconditioner_every, step)
        return _check.count("InverseFree", "preconditioner_every", every, 1)

    def curvature(self, shape: Shape) -> InverseFreeCurvature:
        chosen = STRUCTURES[self.structure] if isinstance(self.structure, str) else self.structure
        singd = self.variant == "singd"
        input = InverseRoot.start(shape.d_in, Diagonal() if shape.one_hot else chosen, shape, with_momentum=singd)
        output = None if shape.single else InverseRoot.start(shape.d_out, chosen, shape, with_momentum=singd)
        return InverseFreeCurvature(self, input, output)


@dataclass
class InverseFreeCurvature(Curvature):
    """K of the inputs and C of the output gradients; a ``single`` layer has no C."""

    strategy: InverseFree
    input: InverseRoot
    output: InverseRoot | None
    renewed: int | None = None

    @property
    def started(self) -> bool:
        return self.renewed is not None

    def absorb(self, rows: Rows, now: Now) -> None:
        if self.renewed is not None and now.step - self.renewed < self.strategy.period(now.step):
            return
        self.renewed = now.step
        sides, batches = self._sides(), self._batches(rows)
        if self.strategy.variant == "singd" and len(sides) == 2:
            moves = _together(sides, batches, now)
        else:
            moves = [_alone(side, batch, now) for side, batch in zip(sides, batches, strict=True)]
        for side, move in zip(sides, moves, strict=True):
            side.move(move, self.strategy.rate, self.strategy.momentum, now.finite)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return C Cᵀ ∂W K Kᵀ."""
        if not isinstance(gradient, Tensor):
            first, second = gradient
            return self._from_output(first), self.input.apply(second.mT).mT
        return self._from_output(self.input.apply(gradient))

    def widest_pair(self, entries: int) -> int | None:
        """Compare the flops of both, those of the pair's product included."""
        if self.output is None:
            return None
        d_in, d_out = self.input.n, self.output.n
        by_row, by_column = 2 * self.input.structure.flops(d_in), 2 * self.output.structure.flops(d_out)
        return (d_out * by_row + d_in * by_column) // (by_row + by_column + 2 * entries)

    def kept(self) -> Iterator[Kept]:
        yield Kept("input", self.input.n, repr(self.input.structure), self.input.tensors())
        if self.output is not None:
            yield Kept("output", self.output.n, repr(self.output.structure), self.output.tensors())

    def state_dict(self) -> dict[str, Any]:
        sides = {"input": self.input, "output": self.output}
        states = {name: side.state_dict() for name, side in sides.items() if side is not None}
        return {**states, "renewed": self.renewed}

    def loaded(self, state: dict[str, Any], where: str) -> InverseFreeCurvature:
        input = self.input.loaded(state["input"], f"{where} (input)")
        output = None if self.output is None else self.output.loaded(state["output"], f"{where} (output)")
        return replace(self, input=input, output=output, renewed=state["renewed"])

    def tensors(self) -> Iterator[Tensor]:
        for kept in self.kept():
            yield from kept.tensors

    def _sides(self) -> list[InverseRoot]:
        return [self.input] if self.output is None else [self.input, self.output]

    def _batches(self, rows: Rows) -> list[Batch]:
        """Return A and G of the rows, as `Kronecker` has them."""
        dtype = self.input.direction.dtype
        if self.output is None:
            return [RowBatch(rows.inputs.to(dtype), rows.uses)]
        G = RowBatch(rows.gradients.to(dtype), rows.uses)
        if not rows.inputs.is_floating_point():
            return [CountBatch.of(rows.inputs, 1 / rows.uses, self.input.n, dtype), G]
        return [RowBatch(rows.inputs.to(dtype), 1 / rows.uses), G]

    def _from_output(self, columns: Tensor) -> Tensor:
        return columns if self.output is None else self.output.apply(columns.mT).mT


def _alone(side: InverseRoot, batch: Batch, now: Now) -> Move:
    """IKFAC, and SINGD where the other factor is 1."""
    unknown = side.largest() == 0
    side.observe(batch, now)
    damping = now.damping.of(side.largest())
    side.restart(unknown & now.finite, (batch.mean_eigenvalue() + damping).rsqrt())
    return Move(*side.look(batch), 1, damping)


def _together(sides: list[InverseRoot], batches: list[Batch], now: Now) -> list[Move]:
    """SINGD: each side's curvature and damping are scaled by traces of the other."""
    unknown = sides[0].largest() * sides[1].largest() == 0
    for side, batch in zip(sides, batches, strict=True):
        side.observe(batch, now)
    damping = now.damping.of(sides[0].largest()) * now.damping.of(sides[1].largest())
    mean = batches[0].mean_eigenvalue() * batches[1].mean_eigenvalue()
    for side in sides:
        side.restart(unknown & now.finite, (mean + damping).pow(-0.25))
    looks = [side.look(batch) for side, batch in zip(sides, batches, strict=True)]
    moves = []
    for look, other, seen_and_own in zip(looks, sides[::-1], looks[::-1], strict=True):
        curvature, tail = (other.structure.trace(part) / other.n for part in seen_and_own)
        moves.append(Move(*look, curvature, damping * tail))
    return moves
