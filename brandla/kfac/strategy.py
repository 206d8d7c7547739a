"""What a K-FAC system is to the loop: it makes the curvature of each layer, feeds it, and solves with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from brandla.kfac.alike import alike
from brandla.kfac.schedule import spelled

if TYPE_CHECKING:
    from brandla.kfac.factor import Factor

Scale = Literal["relative", "absolute"]
# The gradient of a layer as a matrix (..., d_out, d_in), or P (..., d_out, k) and Q (..., d_in, k) standing for P Qᵀ.
Gradient: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Shape(NamedTuple):
    """Of a layer's weight as a matrix (*groups, d_out, d_in), the bias's column counted in.

    ``one_hot`` inputs are given as indices, and their factor is diagonal. ``single`` layers have no output factor:
    their input rows are whole gradients of samples.
    """

    groups: tuple[int, ...]
    d_out: int
    d_in: int
    dtype: torch.dtype
    device: torch.device
    one_hot: bool = False
    single: bool = False


class Rows(NamedTuple):
    """Uses of a weight: inputs a (*groups, N, d_in) and output gradients γ (*groups, m N, d_out) of a mean loss.

    The bias's 1 is the last entry of a. ``uses`` is N, samples times ``positions``, sample by sample; m > 1 where the
    curvature takes m gradients of every use. One-hot inputs are (N,) indices, −1 for a row of zeros; those of single
    layers are m N rows, and their gradients the same.
    """

    inputs: Tensor
    gradients: Tensor
    uses: int
    positions: int = 1
    single: bool = False


class Damping(NamedTuple):
    """λ, relative to each factor's largest eigenvalue or absolute."""

    value: float
    scale: Scale

    def of(self, largest: Tensor) -> Tensor:
        """Return λ for factors of these largest eigenvalues; 1 for one that is zero so far, which leaves its side.

        So is one whose λ is no normal number any more: 1/λ might not be finite.
        """
        if self.scale == "absolute":
            return torch.full_like(largest, self.value)
        shift = self.value * largest
        return torch.where(shift > torch.finfo(shift.dtype).tiny, shift, 1)

    def of_each(self, largest: Sequence[Tensor]) -> list[Tensor]:
        """Return λ for each of a list of factors."""
        return alike(
            largest,
            lambda own: (own.shape, own.dtype, own.device),
            lambda members: self.of(torch.stack(members)).unbind(),
        )


class Now(NamedTuple):
    """What a step of training brings besides data.

    ``seed`` is new at every step. Where ``finite``, a 0-dim bool tensor, is False, the rows are all 0 and the step
    counts for nothing.
    """

    step: int
    seed: int
    decay: float
    damping: Damping
    finite: Tensor


class Problem(NamedTuple):
    """A layer's gradient to be solved for, with its curvature, and the rows of the step where they were captured."""

    curvature: Curvature
    gradient: Gradient
    rows: Rows | None


class Kept(NamedTuple):
    """What is kept for one side of a layer where that is no factor: for reports."""

    side: Literal["input", "output"]
    n: int
    note: str
    tensors: Sequence[Tensor]


class Curvature(ABC):
    """What is kept of one layer."""

    @property
    @abstractmethod
    def started(self) -> bool:
        """Whether data came in."""

    @abstractmethod
    def absorb(self, rows: Rows, now: Now) -> None:
        """Take in the rows of a step, and renew what falls due."""

    @abstractmethod
    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return the preconditioned gradient, a pair for a pair or else a matrix."""

    def widest_pair(self, entries: int) -> int | None:
        """Return k up to which a pair (d_out, k), (d_in, k) is cheaper to solve for than its d_out d_in ``entries``.

        None where the curvature is not applied to pairs.
        """
        return None

    def factors(self) -> Iterator[tuple[Literal["input", "output"], Factor]]:
        """Go through the Kronecker factors, where there are any."""
        return iter(())

    def kept(self) -> Iterator[Kept]:
        """Go through what is kept for each side, where there are no factors."""
        return iter(())

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that is kept, as numbers, strings and copies of tensors."""

    @abstractmethod
    def loaded(self, state: dict[str, Any], where: str) -> Curvature:
        """Return a new curvature of this kind that continues from ``state``, or raise ValueError naming ``where``."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Go through all that is kept, to count its memory."""


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """One system of the K-FAC family.

    ``str()`` of it names it in checkpoints and reports. Options that are functions of the step are spelled by their
    qualified name there: a checkpoint is continued by the function of the same name.
    """

    # Whether `solve` reads the rows of the step, which every process then needs.
    reads_rows: ClassVar[bool] = False

    def __str__(self) -> str:
        return spelled(self)

    @abstractmethod
    def curvature(self, shape: Shape) -> Curvature:
        """Return the curvature of a layer before any data."""

    def absorb(self, curvatures: Sequence[Curvature], rows: Sequence[Rows], now: Now) -> None:
        """Take the rows of a step into the curvatures of all layers of this strategy."""
        for index, (curvature, own) in enumerate(zip(curvatures, rows, strict=True)):
            curvature.absorb(own, now._replace(seed=now.seed + index))

    def solve(self, problems: Sequence[Problem], now: Now) -> list[Gradient]:
        """Return the preconditioned gradients of all layers of this strategy."""
        return [problem.curvature.solve(problem.gradient, now) for problem in problems]
