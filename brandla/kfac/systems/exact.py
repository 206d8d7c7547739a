"""K-FAC in its original form, RS-KFAC and SRE-KFAC: a dense running factor, decomposed now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from brandla import _check
from brandla._small import safe_eigh
from brandla.kfac.systems.form import DenseForm, FactorForm, State, due
from brandla.kfac.systems.kronecker import FactorStrategy
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.values import Damping
from brandla.lowrank import LowRankEigh
from brandla.randomized import randomized_eigh, randomized_svd


@dataclass(frozen=True)
class Exact(DenseForm, FactorStrategy):
    """K-FAC: a dense average, decomposed every ``inverse_every`` steps. O(n²) memory, O(n³) at a renewal.

    Parameters
    ----------
    inverse_every
        Steps between renewals: a number, or a function of the step.
    method
        ``"eigh"``: M = U diag(d) Uᵀ, about 9n³ operations, waits for the device. ``"cholesky"``: M + λI = L Lᵀ, n³/3
        operations, never waits. λ is fixed at the renewal, relative to a lower estimate of the largest eigenvalue by
        power iteration, and at least n·ε times the estimate. If the factorisation fails, the last one stays.

    References
    ----------
    J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, Exact
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), Exact(inverse_every=10))
    """

    # Whether young factors are renewed more often.
    renews_early: ClassVar[bool] = True

    inverse_every: Schedule[int] = 10
    method: Literal["eigh", "cholesky"] = "eigh"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.count("Exact", "inverse_every", at(self.inverse_every, 0), 1)
        _check.choice("Exact", "method", self.method, ("eigh", "cholesky"))
        if self.method == "cholesky" and self.tail != 0:
            rule = "tail must be 0 for method='cholesky', which leaves no eigenvalue out"
            _check.fail_value("Exact", f"{rule}; got {self.tail!r}")

    @property
    def is_capturable(self) -> bool:
        return self.method == "cholesky" and self.inverse_every == 1

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        state = super().start(n, groups, dtype, device)
        if self.method == "eigh":
            return state | LowRankEigh.zeros(n, n, batch_shape=groups, dtype=dtype, device=device)._asdict()
        state["largest"] = torch.zeros(groups, dtype=dtype, device=device)
        state["shift"] = torch.ones(groups, dtype=dtype, device=device)
        state["cholesky"] = torch.eye(n, dtype=dtype, device=device).expand(*groups, n, n).clone()
        return state

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        if not due(state, step, self.inverse_every, early=self.renews_early):
            return
        average = self.average(state)
        if self.method == "eigh":
            state.update(self.decompose(average)._asdict())
            self.keep_trace(state)
            return
        shift, largest = damping.of_matrix(average)
        average.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
        factor, info = torch.linalg.cholesky_ex(average)
        succeeded = info == 0
        # If M + λI is not positive definite, the last factorisation stays.
        state["cholesky"] = torch.where(succeeded[..., None, None], factor, state["cholesky"])
        for name, new in (("shift", shift), ("largest", largest)):
            state[name] = torch.where(succeeded, new, state[name])

    def decompose(self, average: Tensor) -> LowRankEigh:
        """Return all eigenpairs of M."""
        return LowRankEigh(*safe_eigh(average))

    def largest_of_each(self, states: Sequence[State]) -> list[Tensor]:
        return super().largest_of_each(states) if self.method == "eigh" else [state["largest"] for state in states]

    def damped_solve_of_each(self, problems: Sequence[tuple[State, Tensor, Tensor]]) -> list[Tensor]:
        """Return the result of two triangular solves, with the λ of the last renewal."""
        return [torch.cholesky_solve(block, state["cholesky"]) for state, block, _ in problems]

    def approximation(self, state: State) -> Tensor:
        if self.method == "eigh":
            return super().approximation(state)
        approximation: Tensor = state["cholesky"] @ state["cholesky"].mT
        approximation.diagonal(dim1=-2, dim2=-1).sub_(state["shift"][..., None])
        return approximation


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
        Options of these functions.
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
        if due(state, step, self.inverse_every, early=True):
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
        """Replace small factors by Exact: a sketch as wide as the matrix saves nothing."""
        rank = at(self.rank, 0)
        if rank + self.oversample < n:
            return None
        reason = f"rank {rank} + oversample {self.oversample} >= n = {n}"
        return Exact(inverse_every=self.inverse_every, tail=self.tail), reason
