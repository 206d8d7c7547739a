"""The forms in which Kronecker factors are kept, and their states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from brandla import _check
from brandla.damped import LowRank
from brandla.kfac.systems.schedule import Schedule, at, spelled
from brandla.kfac.values import Damping, Now, layout, map_by_kind
from brandla.lowrank import LowRankEigh, LowRankRoot, Tracked, stack_numbers, stacked
from brandla_kernels import gram_ema_

# Named tensors, numbers, strings and nested states.
State = dict[str, Any]


def tensors_of(part: Any) -> list[Tensor]:
    """Return the tensors of a state, or of a part of it."""
    return [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)]


def check_shape(
    saved: Tensor, wanted: Sequence[int], what: str, *, free: int = 0, function: str = "KFAC.load_state_dict"
) -> None:
    """Check the shape of a saved tensor, except its last ``free`` dimensions."""
    fixed = len(wanted) - free
    if saved.ndim != len(wanted) or tuple(saved.shape[:fixed]) != tuple(wanted[:fixed]):
        _check.fail_value(function, f"{what} must have shape {tuple(wanted)}; got {tuple(saved.shape)}")


def restored(saved: Tensor, like: Tensor, what: str, *, free: int = 0) -> Tensor:
    """Return a copy of ``saved`` in ``like``'s dtype and device. Shapes must agree but for ``free`` last dimensions."""
    check_shape(saved, like.shape, what, free=free)
    return saved.to(like, copy=True)


def due(state: State, step: int, every: Schedule[int], *, early: bool = False) -> bool:
    """Return whether ``every`` steps have passed since this last returned True for the state; True at first.

    With ``early``, the first waits are only 1, 2, 4, ... steps: the first data may be 0, as below a head of zeros.
    """
    wait, last = at(every, step), state.get("renewed")
    if early:
        begun = state.setdefault("begun", step)
        wait = min(wait, state.get("renewed", begun) - begun + 1)
    if last is not None and step - last < wait:
        return False
    state["renewed"] = step
    return True


class Absorption(NamedTuple):
    """New columns A (*groups, n, k) for the factor of a state, 0 if not finite; (k,) indices for a diagonal factor.

    They enter an exponential sum, S ← decay · S + weight · A Aᵀ. ``decayed`` is decay times the last total of weights.
    """

    state: State
    columns: Tensor
    weight: float
    decayed: Tensor


@dataclass(frozen=True, kw_only=True)
class FactorForm(ABC):
    """One form of a Kronecker factor M: how it starts, takes in data, is renewed, and is solved with.

    ``state["total"]`` is the total of the weights. A sum in a state, ``"dense"`` or ``"diagonal"``, is M times the
    total; all other parts belong to M itself.

    Parameters
    ----------
    tail
        τ of the damped inverse: a number >= 0, ``"smallest"`` (spectrum continuation), or ``"mean"``, the mean of the
        left-out eigenvalues, from the trace of M.
    """

    # Parts of a state that solving does not read: only updates and reports do.
    unread: ClassVar[tuple[str, ...]] = ()

    tail: float | Literal["mean", "smallest"] = 0.0

    def __post_init__(self) -> None:
        tail: object = self.tail
        if tail not in ("mean", "smallest") and not (isinstance(tail, (int, float)) and tail >= 0):
            _check.fail_value(type(self).__name__, f"tail must be a number >= 0, 'mean' or 'smallest'; got {tail!r}")

    __str__ = spelled

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph can hold a step: every step does the same and never waits for the device."""
        return False

    @abstractmethod
    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Return the state of factors (*groups, n, n) before any data."""

    @abstractmethod
    def take(self, absorptions: Sequence[Absorption], now: Now) -> None:
        """Absorb new columns into the states of factors of this form."""

    # This method is not abstract, because some forms have nothing to renew.
    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:  # noqa: B027
        """Renew the parts that are due at this step. Each step and factor has its own ``seed``."""

    def lowrank(self, state: State) -> LowRankEigh | LowRankRoot | None:
        """Return M in the state's low-rank form, or None if it has none; such a form has a solve of its own."""
        if "root" in state:
            return LowRankRoot(state["root"], state["gram"])
        return LowRankEigh(state["eigenvalues"], state["eigenvectors"]) if "eigenvalues" in state else None

    def operand(self, state: State) -> LowRank | None:
        """Return M for the damped functions: its low-rank form, with the trace if the tail needs it."""
        lowrank = self.lowrank(state)
        if lowrank is None or self.tail != "mean":
            return lowrank
        factor: Any = lowrank
        return Tracked(factor, torch.zeros_like(state["trace"]), state["trace"])

    def largest_of_each(self, states: Sequence[State]) -> list[Tensor]:
        """Return the largest eigenvalues (*groups,) of each state."""
        lowranks: list[Any] = [self.lowrank(state) for state in states]
        return [lowrank.largest_eigenvalue() for lowrank in lowranks]

    def damped_solve_of_each(self, problems: Sequence[tuple[State, Tensor, Tensor]]) -> list[Tensor]:
        """Return (M + λI)⁻¹ times a block (..., n, m) for each (state, block, λ), for forms without a low-rank form."""
        rule = "a form whose lowrank() is None must define largest_of_each() and damped_solve_of_each()"
        raise NotImplementedError(rule)

    def error_bound(self, state: State) -> Tensor:
        """Return an upper bound of ‖M − M̂‖₂ for reports, shape (*groups,); 0 if the state has none."""
        bound: Tensor = state.get("error_bound", torch.zeros_like(state["total"]))
        return bound

    def solving(self, state: State) -> State:
        """Return the parts of a state that solving reads."""
        return {name: part for name, part in state.items() if name not in self.unread}

    def substitute(self, n: int) -> tuple[FactorForm, str] | None:
        """Return another form and the reason for it, or None if this form suits order ``n``."""
        return None


@dataclass(frozen=True, kw_only=True)
class DenseForm(FactorForm):
    """A form that keeps the dense sum S in ``state["dense"]``, and another form of M that it renews from S."""

    unread: ClassVar[tuple[str, ...]] = ("dense",)

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        return {"dense": torch.zeros(*groups, n, n, dtype=dtype, device=device)}

    def take(self, absorptions: Sequence[Absorption], now: Now) -> None:
        for state, columns, weight, _ in absorptions:
            gram_ema_(state["dense"], columns, now.decay, weight)

    def average(self, state: State) -> Tensor:
        """Return M = S / total."""
        return cast(Tensor, state["dense"] / state["total"])

    def approximation(self, state: State) -> Tensor:
        """Return M̂ as a dense matrix."""
        lowrank: Any = self.lowrank(state)
        return cast(Tensor, lowrank.dense())

    def error_bound(self, state: State) -> Tensor:
        """Return ‖M − M̂‖_F >= ‖M − M̂‖₂ for the current M."""
        return cast(Tensor, torch.linalg.matrix_norm(self.average(state) - self.approximation(state)))

    def keep_trace(self, state: State) -> None:
        """Keep the trace of M if the tail needs it."""
        if self.tail == "mean":
            state["trace"] = state["dense"].diagonal(dim1=-2, dim2=-1).sum(-1) / state["total"]


@dataclass(frozen=True, kw_only=True)
class Diagonal(FactorForm):
    """The factor of an embedding's one-hot inputs: M = diag(frequencies), exact in n numbers, so it needs no tail.

    Its columns are indices (k,), with −1 for a column of zeros.
    """

    @property
    def is_capturable(self) -> bool:
        return True

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        return {"diagonal": torch.zeros(*groups, n, dtype=dtype, device=device)}

    def take(self, absorptions: Sequence[Absorption], now: Now) -> None:
        for state, indices, weight, _ in absorptions:
            diagonal = state["diagonal"]
            weights = ((indices >= 0) & now.finite).to(diagonal.dtype) * weight
            diagonal.mul_(now.decay).index_add_(0, indices.clamp(min=0), weights)

    def largest_of_each(self, states: Sequence[State]) -> list[Tensor]:
        return [state["diagonal"].amax(-1) / state["total"] for state in states]

    def damped_solve_of_each(self, problems: Sequence[tuple[State, Tensor, Tensor]]) -> list[Tensor]:
        return [
            block / (state["diagonal"] / state["total"] + shift[..., None])[..., None]
            for state, block, shift in problems
        ]


@dataclass(frozen=True, kw_only=True)
class Blocks(DenseForm):
    """Batches of factors of order 1 or 2, solved directly at every step, so they need no tail."""

    unread: ClassVar[tuple[str, ...]] = ()

    @property
    def is_capturable(self) -> bool:
        return True

    def largest_of_each(self, states: Sequence[State]) -> list[Tensor]:
        """Return the largest eigenvalues in closed form: ½ (a + c) + √(¼ (a − c)² + b²)."""

        def largest(members: list[State]) -> Sequence[Tensor]:
            blocks = _averages(members)
            diagonal = blocks.diagonal(dim1=-2, dim2=-1)
            if diagonal.shape[-1] == 1:
                return diagonal[..., 0].unbind()
            first, last = diagonal.unbind(-1)
            return ((first + last) / 2 + torch.hypot((first - last) / 2, blocks[..., 0, 1])).unbind()

        return map_by_kind(states, lambda state: layout(state["dense"]), largest)

    def damped_solve_of_each(self, problems: Sequence[tuple[State, Tensor, Tensor]]) -> list[Tensor]:
        """Solve densely. M + λI is regular, because λ > 0."""

        def solve(members: list[tuple[State, Tensor, Tensor]]) -> Sequence[Tensor]:
            states, right, shifts = zip(*members, strict=True)
            averages = _averages(states)
            averages.diagonal(dim1=-2, dim2=-1).add_(stacked(shifts)[..., None])
            return cast(Tensor, torch.linalg.solve_ex(averages, stacked(right)).result).unbind()

        return map_by_kind(problems, lambda problem: (layout(problem[0]["dense"]), layout(problem[1])), solve)

    def error_bound(self, state: State) -> Tensor:
        return torch.zeros_like(state["total"])


def _averages(states: Sequence[State]) -> Tensor:
    """Return M = S / total of each state, in one tensor."""
    sums = stacked([state["dense"] for state in states])
    totals = stack_numbers([state["total"] for state in states], sums)
    assert isinstance(totals, Tensor)
    return sums / totals.view(-1, *[1] * (sums.ndim - 1))
