"""How a Kronecker factor is kept, and the state it is kept in."""

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
from brandla.kfac.values import Damping, Now, alike, layout
from brandla.lowrank import LowRankEigh, LowRankRoot, Tracked, stack_numbers, stacked
from brandla_kernels import gram_ema_

# Tensors, numbers and strings by their names, and mappings of them.
State = dict[str, Any]


def tensors_of(part: Any) -> list[Tensor]:
    """Return the tensors of a state, or of a part of it."""
    return [own for own in tree_leaves(part) if isinstance(own, Tensor)]


def check_shape(
    saved: Tensor, wanted: Sequence[int], what: str, *, free: int = 0, function: str = "KFAC.load_state_dict"
) -> None:
    """Check the shape of a saved tensor, but for its last ``free`` dimensions."""
    fixed = len(wanted) - free
    if saved.ndim != len(wanted) or tuple(saved.shape[:fixed]) != tuple(wanted[:fixed]):
        _check.fail_value(function, f"{what} must have shape {tuple(wanted)}; got {tuple(saved.shape)}")


def restored(saved: Tensor, like: Tensor, what: str, *, free: int = 0) -> Tensor:
    """Return a copy of a saved tensor in the place of one of its shape, but for the last ``free`` dimensions."""
    check_shape(saved, like.shape, what, free=free)
    return saved.to(like, copy=True)


def due(state: State, step: int, every: Schedule[int], *, early: bool = False) -> bool:
    """Say whether ``every`` steps have passed since the last time this returned True for the state.

    With ``early`` only 1, 2, 4, ... at first: the first data may be 0, as below a head that begins at 0.
    """
    wait, last = at(every, step), state.get("renewed")
    if early:
        begun = state.setdefault("begun", step)
        wait = min(wait, (begun if last is None else last) - begun + 1)
    if last is not None and step - last < wait:
        return False
    state["renewed"] = step
    return True


class Absorption(NamedTuple):
    """Columns (*groups, n, k) for the factor of a state, all 0 unless finite; (k,) indices for a diagonal one.

    They go into an exponential sum: S ← decay · S + weight · A Aᵀ. ``decayed`` is decay times the last sum of weights.
    """

    state: State
    columns: Tensor
    weight: float
    decayed: Tensor


@dataclass(frozen=True, kw_only=True)
class FactorForm(ABC):
    """How a Kronecker factor M is kept: started, fed, refreshed and solved with.

    A dense sum S in a state is M times ``state["total"]``, the sum of the weights; all else is that of M.

    Parameters
    ----------
    tail
        τ of the damped inverse: a number >= 0, ``"smallest"`` (spectrum continuation), or ``"mean"``, the mean of the
        eigenvalues that are left out, from the trace of M.
    """

    # Parts of a state that only updates and reports read.
    unread: ClassVar[tuple[str, ...]] = ()

    tail: float | Literal["mean", "smallest"] = 0.0

    def __post_init__(self) -> None:
        tail: object = self.tail
        if tail not in ("mean", "smallest") and not (isinstance(tail, (int, float)) and tail >= 0):
            _check.fail_value(type(self).__name__, f"tail must be a number >= 0, 'mean' or 'smallest'; got {tail!r}")

    __str__ = spelled

    @property
    def is_capturable(self) -> bool:
        """Whether every step does the same, and none waits for the device: a CUDA graph may hold it."""
        return False

    @abstractmethod
    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        """Return the state of factors (*groups, n, n) before any data."""

    @abstractmethod
    def take(self, absorptions: Sequence[Absorption], now: Now) -> None:
        """Take new columns into the states of factors of this form."""

    # Most forms have nothing to renew, so it is not abstract.
    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:  # noqa: B027
        """Renew the parts that are due at this step; ``seed`` is new at every step and factor."""

    def lowrank(self, state: State) -> LowRankEigh | LowRankRoot | None:
        """Return M in the low-rank form that the state has; None where it has none: the form has a solve of its own."""
        if "root" in state:
            return LowRankRoot(state["root"], state["gram"])
        return LowRankEigh(state["eigenvalues"], state["eigenvectors"]) if "eigenvalues" in state else None

    def operand(self, state: State) -> LowRank | None:
        """Return M for the damped functions: its low-rank form, with its trace where the tail needs that."""
        lowrank = self.lowrank(state)
        if lowrank is None or self.tail != "mean":
            return lowrank
        factor: Any = lowrank
        return Tracked(factor, torch.zeros_like(state["trace"]), state["trace"])

    def largest_of_each(self, states: Sequence[State]) -> list[Tensor]:
        """Return the largest eigenvalues (*groups,) of each state."""
        lowranks: list[Any] = [self.lowrank(state) for state in states]
        return [own.largest_eigenvalue() for own in lowranks]

    def damped_solve_of_each(self, problems: Sequence[tuple[State, Tensor, Tensor]]) -> list[Tensor]:
        """Return (M + λI)⁻¹ times a block (..., n, m) for each state, block and λ, where M has no low-rank form."""
        rule = "a form whose lowrank() is None has largest_of_each() and damped_solve_of_each() of its own"
        raise NotImplementedError(rule)

    def error_bound(self, state: State) -> Tensor:
        """Return an upper bound of ‖M − M̂‖₂ for reports, shape (*groups,): 0 unless the state has another."""
        bound: Tensor = state.get("error_bound", torch.zeros_like(state["total"]))
        return bound

    def solving(self, state: State) -> State:
        """Return the part of a state that is read to solve with it."""
        return {name: part for name, part in state.items() if name not in self.unread}

    def substitute(self, n: int) -> tuple[FactorForm, str] | None:
        """Return another form and the reason, where this one does not apply to order ``n``."""
        return None


@dataclass(frozen=True, kw_only=True)
class DenseForm(FactorForm):
    """A form that keeps the dense sum S in ``state["dense"]``, and with it a form of M made from it now and then."""

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
        """‖M − M̂‖_F >= ‖M − M̂‖₂ for M as it is now."""
        return cast(Tensor, torch.linalg.matrix_norm(self.average(state) - self.approximation(state)))

    def keep_trace(self, state: State) -> None:
        """Keep the trace of M, where the tail comes from it."""
        if self.tail == "mean":
            state["trace"] = state["dense"].diagonal(dim1=-2, dim2=-1).sum(-1) / state["total"]


@dataclass(frozen=True, kw_only=True)
class Diagonal(FactorForm):
    """The factor of an embedding's one-hot inputs: M = diag(frequencies), exact in n numbers, so with no tail.

    Its columns are given as indices (k,), −1 for a column of zeros.
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
    """Factors of order 1 and 2, many at once, solved with directly at every step, so with no tail."""

    unread: ClassVar[tuple[str, ...]] = ()

    @property
    def is_capturable(self) -> bool:
        return True

    def largest_of_each(self, states: Sequence[State]) -> list[Tensor]:
        """Return the largest eigenvalues, in closed form: ½ (a + c) + √(¼ (a − c)² + b²)."""

        def of(members: list[State]) -> Sequence[Tensor]:
            blocks = _averages(members)
            diagonal = blocks.diagonal(dim1=-2, dim2=-1)
            if diagonal.shape[-1] == 1:
                return diagonal[..., 0].unbind()
            first, last = diagonal.unbind(-1)
            return ((first + last) / 2 + torch.hypot((first - last) / 2, blocks[..., 0, 1])).unbind()

        return alike(states, lambda state: layout(state["dense"]), of)

    def damped_solve_of_each(self, problems: Sequence[tuple[State, Tensor, Tensor]]) -> list[Tensor]:
        """Solve densely; regular, since λ > 0."""

        def of(members: list[tuple[State, Tensor, Tensor]]) -> Sequence[Tensor]:
            own, right, added = zip(*members, strict=True)
            averages = _averages(own)
            averages.diagonal(dim1=-2, dim2=-1).add_(stacked(added)[..., None])
            return cast(Tensor, torch.linalg.solve_ex(averages, stacked(right)).result).unbind()

        return alike(problems, lambda own: (layout(own[0]["dense"]), layout(own[1])), of)

    def error_bound(self, state: State) -> Tensor:
        return torch.zeros_like(state["total"])


def _averages(states: Sequence[State]) -> Tensor:
    """Return M = S / total of each state, in one tensor."""
    sums = stacked([state["dense"] for state in states])
    totals = stack_numbers([state["total"] for state in states], sums)
    assert isinstance(totals, Tensor)
    return sums / totals.view(-1, *[1] * (sums.ndim - 1))
