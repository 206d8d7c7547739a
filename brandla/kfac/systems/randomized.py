"""RS-KFAC and SRE-KFAC: a dense running factor and its randomized decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from brandla import _check
from brandla.kfac.systems.exact import Exact
from brandla.kfac.systems.form import DenseForm, FactorForm, State, due_early
from brandla.kfac.systems.kronecker import FactorStrategy
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.values import Damping
from brandla.lowrank import LowRankEigh
from brandla.randomized import randomized_eigh, randomized_svd


@dataclass(frozen=True)
class Randomized(DenseForm, FactorStrategy):
    """RS-KFAC (``method="svd"``) and SRE-KFAC (``method="eigh"``): O(n²) memory, O(n² r) at a renewal.

    Parameters
    ----------
    rank
        r: a number, or a function of the step.
    method
        ``"eigh"``: `brandla.randomized_eigh` of the dense average; ``"svd"``: `brandla.randomized_svd`.
    oversample, power_iterations
        As in those functions.
    inverse_every
        Steps between renewals: a number, or a function of the step.

    References
    ----------
    C. O. Puiu, "Randomized K-FACs: speeding up K-FAC with randomized numerical linear algebra", arXiv 2206.15397.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, Randomized
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), Randomized(rank=4))
    """

    rank: Schedule[int]
    method: Literal["svd", "eigh"] = "eigh"
    oversample: int = 10
    power_iterations: int = 3
    inverse_every: Schedule[int] = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.count("Randomized", "rank", at(self.rank, 0), 1)
        _check.count("Randomized", "inverse_every", at(self.inverse_every, 0), 1)
        _check.count("Randomized", "oversample", self.oversample, 0)
        _check.count("Randomized", "power_iterations", self.power_iterations, 0)
        _check.choice("Randomized", "method", self.method, ("svd", "eigh"))

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        zeros = LowRankEigh.zeros(n, at(self.rank, 0), batch_shape=groups, dtype=dtype, device=device)
        return super().start(n, groups, dtype, device) | zeros._asdict()

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        if due_early(state, step, self.inverse_every):
            average = self.average(state)
            state.update(self.decompose(average, min(at(self.rank, step), average.shape[-1]), seed)._asdict())
            self.keep_trace(state)

    def decompose(self, matrix: Tensor, rank: int, seed: int) -> LowRankEigh:
        """Return the ``rank`` leading eigenpairs of ``matrix`` from a random start that ``seed`` fixes."""
        options: dict[str, Any] = {
            "oversample": self.oversample,
            "power_iterations": self.power_iterations,
            "generator": torch.Generator(matrix.device).manual_seed(seed),
        }
        if self.method == "eigh":
            return randomized_eigh(matrix, rank, **options)
        svd = randomized_svd(matrix, rank, **options)
        return LowRankEigh(svd.S, svd.U)

    def substitute(self, n: int) -> tuple[FactorForm, str] | None:
        """Give small factors to Exact: a sketch as wide as the matrix saves nothing."""
        rank = at(self.rank, 0)
        if rank + self.oversample < n:
            return None
        reason = f"rank {rank} + oversample {self.oversample} >= n = {n}"
        return Exact(inverse_every=self.inverse_every, tail=self.tail), reason
