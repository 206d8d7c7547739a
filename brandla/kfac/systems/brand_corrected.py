"""B-KFAC-C: Brand updates, corrected now and then against the dense factor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from brandla import _check
from brandla.correction import ritz_correct
from brandla.kfac.systems.brand import DenseBrand
from brandla.kfac.systems.form import State, due, store, stored
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.values import Damping
from brandla.lowrank import LowRankEigh


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
            eigh, average = stored(state), self.average(state)
            generator = torch.Generator(average.device).manual_seed(seed)
            shuffled = torch.randperm(eigh.rank, generator=generator, device=average.device)
            store(state, ritz_correct(eigh, average, shuffled[: math.ceil(self.fraction * eigh.rank)]))
        self.keep_trace(state)
