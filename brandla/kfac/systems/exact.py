"""K-FAC as it was first described: a dense running factor, decomposed or factorised now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from brandla import _check
from brandla._small import safe_eigh
from brandla.kfac.systems.form import DenseForm, State, due_early
from brandla.kfac.systems.kronecker import FactorStrategy
from brandla.kfac.systems.schedule import Schedule, at
from brandla.kfac.values import Damping
from brandla.lowrank import LowRankEigh


@dataclass(frozen=True)
class Exact(DenseForm, FactorStrategy):
    """K-FAC: dense average, renewed every ``inverse_every`` steps. O(n²) memory, O(n³) at a renewal.

    Parameters
    ----------
    inverse_every
        Steps between renewals: a number, or a function of the step.
    method
        ``"eigh"``: M = U diag(d) Uᵀ, about 9n³ operations, waits for the device. ``"cholesky"``: M + λI = L Lᵀ, n³/3
        operations, never waits; λ is fixed at the renewal: relative to an estimate of the largest eigenvalue, from
        below by power iteration, and at least n·ε times it. If the factorisation fails, the last one stays.

    References
    ----------
    J. Martens, R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, Exact
    >>> preconditioner = KFAC(torch.nn.Linear(20, 10), Exact(inverse_every=10))
    """

    inverse_every: Schedule[int] = 10
    method: Literal["eigh", "cholesky"] = "eigh"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.count("Exact", "inverse_every", at(self.inverse_every, 0), 1)
        _check.choice("Exact", "method", self.method, ("eigh", "cholesky"))
        if self.method == "cholesky" and self.tail != 0:
            rule = "tail has no meaning for method='cholesky', which leaves no eigenvalue out"
            _check.fail_value("Exact", f"{rule}; got {self.tail!r}")

    def start(self, n: int, groups: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> State:
        state = super().start(n, groups, dtype, device)
        if self.method == "eigh":
            return state | LowRankEigh.zeros(n, n, batch_shape=groups, dtype=dtype, device=device)._asdict()
        state["largest"] = torch.zeros(groups, dtype=dtype, device=device)
        state["shift"] = torch.ones(groups, dtype=dtype, device=device)
        state["cholesky"] = torch.eye(n, dtype=dtype, device=device).expand(*groups, n, n).clone()
        return state

    def refresh(self, state: State, step: int, seed: int, damping: Damping) -> None:
        if not self.is_due(state, step):
            return
        average = self.average(state)
        if self.method == "eigh":
            state.update(self.decompose(average)._asdict())
            self.keep_trace(state)
            return
        shift, largest = damping.of_matrix(average)
        average.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
        factor, info = torch.linalg.cholesky_ex(average)
        done = info == 0
        renewed = {"cholesky": (factor, done[..., None, None]), "shift": (shift, done), "largest": (largest, done)}
        # What is there stays where M + λI is not positive definite.
        state |= {name: torch.where(where, new, state[name]) for name, (new, where) in renewed.items()}

    def is_due(self, state: State, step: int) -> bool:
        """Renew young factors more often."""
        return due_early(state, step, self.inverse_every)

    def decompose(self, average: Tensor) -> LowRankEigh:
        """Return all eigenpairs of M."""
        return LowRankEigh(*safe_eigh(average))

    def largest(self, state: State) -> Tensor:
        return super().largest(state) if self.method == "eigh" else cast(Tensor, state["largest"])

    def damped_solve(self, state: State, block: Tensor, shift: Tensor) -> Tensor:
        """Solve by two triangular solves, with the λ of the last renewal."""
        return torch.cholesky_solve(block, state["cholesky"])

    def approximation(self, state: State) -> Tensor:
        if self.method == "eigh":
            return super().approximation(state)
        approximation: Tensor = state["cholesky"] @ state["cholesky"].mT
        approximation.diagonal(dim1=-2, dim2=-1).sub_(state["shift"][..., None])
        return approximation
