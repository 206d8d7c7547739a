"""B-R-KFAC: Brand updates between randomized decompositions of the dense factor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from brandla import _check
from brandla.kfac.systems.brand import DenseBrand, kept
from brandla.kfac.systems.form import State, due, normalised, store, tensor
from brandla.kfac.systems.randomized import Randomized
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.values import Damping
from brandla.lowrank import LowRankEigh, LowRankRoot


@dataclass(frozen=True)
class BrandRandomized(DenseBrand):
    """B-R-KFAC: fresh at every update, and rid of truncation error every ``overwrite_every`` steps. O(n²) memory.

    Parameters
    ----------
    rank
        r: a number, a `brandla.Rank` rule, or a function of the step that returns one of them.
    overwrite_every
        Steps between the decompositions that overwrite: a number, or a function of the step.
    oversample, power_iterations
        For these decompositions, as in `brandla.randomized_eigh`.

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
            rank = kept(state).rank
            randomized = Randomized(rank, oversample=self.oversample, power_iterations=self.power_iterations)
            values, vectors = randomized.decompose(tensor(state, "dense"), rank, seed)
            store(state, LowRankRoot.from_eigh(LowRankEigh(normalised(state, values), vectors)))
        self.keep_trace(state)

    def largest(self, state: State) -> Tensor:
        """Return d₁, which an update and an overwriting both leave first on the diagonal of S."""
        return tensor(state, "gram")[..., 0, 0]
