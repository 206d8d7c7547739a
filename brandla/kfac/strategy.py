"""What a K-FAC system is to the loop: how a factor starts, takes in data, is refreshed, and is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from brandla import _check
from brandla.lowrank import LowRankEigh, LowRankSym

State = dict[str, Tensor | int]


class Average(NamedTuple):
    """Weights of one step of an exponential average: M ← decay · M + weight · A Aᵀ."""

    decay: float
    weight: float

    @classmethod
    def at(cls, count: int, decay: float) -> Average:
        """Weights of the ``count``-th data (from 1), normalised so that all weights so far sum to 1."""
        total = 1 - decay**count
        return cls(decay * (1 - decay ** (count - 1)) / total, (1 - decay) / total)


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """One system of the K-FAC family: what is kept for a factor of order n, and when it is renewed.

    Parameters
    ----------
    tail
        τ of the damped inverse: 0, or ``"smallest"`` (spectrum continuation).
    """

    tail: float | Literal["smallest"] = 0.0

    @abstractmethod
    def start(self, n: int, dtype: torch.dtype, device: torch.device) -> State:
        """Return the state of a factor of order ``n`` before any data."""

    @abstractmethod
    def absorb(self, state: State, columns: Tensor, average: Average) -> None:
        """Take new columns (n, k) into the state."""

    # Not abstract: a strategy with nothing periodic leaves it empty.
    def refresh(self, state: State, step: int, seed: int) -> None:  # noqa: B027
        """Do what falls due at this step besides taking in data; ``seed`` is new at every step and factor."""

    @abstractmethod
    def lowrank(self, state: State) -> LowRankEigh | LowRankSym:
        """Return the factor as the damped functions take it."""

    @abstractmethod
    def error_bound(self, state: State) -> Tensor:
        """Return a 0-dim tensor: an upper bound of ‖M − M̂‖₂, for reports."""

    def substitute(self, n: int, k: int) -> tuple[Strategy, str] | None:
        """Return another strategy and the reason, where this one does not apply to order ``n`` and ``k`` columns."""
        return None


def tensor(state: State, name: str) -> Tensor:
    """Read a tensor of a state."""
    return cast(Tensor, state[name])


def eigh_of(state: State) -> LowRankEigh:
    """Read the LowRankEigh of a state."""
    return LowRankEigh(tensor(state, "eigenvalues"), tensor(state, "eigenvectors"))


def store(state: State, eigh: LowRankEigh) -> None:
    """Write the LowRankEigh of a state."""
    state["eigenvalues"], state["eigenvectors"] = eigh


def distance(state: State) -> Tensor:
    """‖M − M̂‖_F >= ‖M − M̂‖₂, where the state holds a dense M. O(n² r): for reports."""
    difference = tensor(state, "dense") - eigh_of(state).dense()
    return difference.square().sum().sqrt()


def due(state: State, step: int, every: int) -> bool:
    """Say whether ``every`` steps have passed since the last time this returned True for the state."""
    last = state.get("renewed")
    if isinstance(last, int) and step - last < every:
        return False
    state["renewed"] = step
    return True


def check_period(strategy: Strategy, name: str) -> None:
    """Check that a period is a whole number of steps, at least 1."""
    _check.count(type(strategy).__name__, name, getattr(strategy, name), 1)


def check_strategy(strategy: Strategy) -> None:
    """Check the options that every strategy has, and its rank where it has one."""
    name = type(strategy).__name__
    tail: object = strategy.tail
    if tail != "smallest" and not (isinstance(tail, (int, float)) and tail >= 0):
        _check.fail_value(name, f"tail must be a number >= 0 or 'smallest'; got {strategy.tail!r}")
    if hasattr(strategy, "rank"):
        _check.count(name, "rank", strategy.rank, 1)
