"""B-KFAC-C and B-R-KFAC: Brand updates, corrected now and then with a dense factor that is kept as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.brand import BrandForm, sketched
from brandla.kfac.systems.exact import Randomized
from brandla.kfac.systems.form import Absorption, DenseForm, State, due
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.values import Damping, Now
from brandla.lowrank import LowRankEigh, LowRankRoot, Rank
from brandla.refresh import ritz_correct


@dataclass(frozen=True)
class DenseBrand(DenseForm, BrandForm):
    """A low-rank form that Brand updates renew, and the dense average that corrects it."""

    kind: ClassVar[type[LowRankRoot | LowRankEigh]]

    rank: Schedule[int | Rank]

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        zeros = self.kind.zeros(n, self.first_rank(), batch_shape=groups, dtype=dtype, device=device)
        return super().start(n, groups, dtype, device) | zeros._asdict()

    def take(self, absorptions: Sequence[Absorption], now: Now) -> None:
        """Add the columns to the dense sum and, sketched if they are many, to the low-rank form."""
        super().take(absorptions, now)
        ranks: list[Any] = [at(self.rank, now.step)] * len(absorptions)
        self.update(sketched(absorptions, "auto", now), ranks, "eigh", now)


@dataclass(frozen=True)
class BrandCorrected(DenseBrand):
    """B-KFAC-C: every ``correct_every`` steps, Rayleigh–Ritz on a random ``fraction`` of the columns. O(n²) memory.

    Parameters
    ----------
    rank
        r: a number, a `brandla.Rank` rule, or a function of the step that returns one of them.
    correct_every
        Steps between corrections: a number, or a function of the step.
    fraction
        Part of the columns of U that a correction takes, in (0, 1].

    References
    ----------
    C. O. Puiu, "Brand New K-FACs", arXiv 2210.08494, the corrected variant.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, BrandCorrected
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), BrandCorrected(rank=4))
    """

    kind = LowRankEigh

    correct_every: Schedule[int] = 10
    fraction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.count("BrandCorrected", "correct_every", at(self.correct_every, 0), 1)
        if not 0 < self.fraction <= 1:
            _check.fail_value("BrandCorrected", f"fraction must be in (0, 1]; got {self.fraction}")

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        if due(state, step, self.correct_every):
            eigh = LowRankEigh(state["eigenvalues"], state["eigenvectors"])
            generator = torch.Generator(eigh.device).manual_seed(seed)
            shuffled = torch.randperm(eigh.rank, generator=generator, device=eigh.device)
            chosen = shuffled[: math.ceil(self.fraction * eigh.rank)]
            state.update(ritz_correct(eigh, self.average(state), chosen)._asdict())
        self.keep_trace(state)


@dataclass(frozen=True)
class BrandRandomized(DenseBrand):
    """B-R-KFAC: Brand updates; every ``overwrite_every`` steps a decomposition removes truncation error. O(n²) memory.

    Parameters
    ----------
    rank
        r: a number, a `brandla.Rank` rule, or a function of the step that returns one of them.
    overwrite_every
        Steps between the decompositions that overwrite: a number, or a function of the step.
    oversample, power_iterations
        Options of these decompositions, as in `brandla.randomized_eigh`.

    References
    ----------
    C. O. Puiu, "Brand New K-FACs", arXiv 2210.08494, the variant with overwriting.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, BrandRandomized
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), BrandRandomized(rank=4))
    """

    kind = LowRankRoot

    overwrite_every: Schedule[int] = 50
    oversample: int = 10
    power_iterations: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.count("BrandRandomized", "overwrite_every", at(self.overwrite_every, 0), 1)
        _check.count("BrandRandomized", "oversample", self.oversample, 0)
        _check.count("BrandRandomized", "power_iterations", self.power_iterations, 0)

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        if due(state, step, self.overwrite_every):
            rank = state["root"].shape[-1]
            randomized = Randomized(rank, oversample=self.oversample, power_iterations=self.power_iterations)
            values, vectors = randomized.decompose(state["dense"], rank, seed)
            state.update(LowRankRoot.from_eigh(LowRankEigh(values / state["total"], vectors))._asdict())
        self.keep_trace(state)

    def largest_of_each(self, states: Sequence[State]) -> list[Tensor]:
        """Return d₁, the first entry on the diagonal of S after an update and after an overwriting."""
        return [state["gram"][..., 0, 0] for state in states]
