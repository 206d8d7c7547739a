"""The products that an algorithm cannot do without, and nothing else: what its time is measured in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.benches.problems import Case, tall_of


def update_floor(case: Case) -> Callable[[], Tensor]:
    """Return the six tall products of Brand's update of an orthonormal basis, with two projections."""
    basis, columns = tall_of(case.factor), case.columns
    r, k = basis.shape[-1], columns.shape[-1]
    first, second = (torch.randn(rows, r, device=basis.device) for rows in (r, k))

    def products() -> Tensor:
        coefficients = basis.mT @ columns
        panel = torch.addmm(columns, basis, coefficients, alpha=-1)
        again = basis.mT @ panel
        panel = torch.addmm(panel, basis, again, alpha=-1)
        panel.mT @ panel
        return (basis @ first).addmm_(panel, second)

    return products


def solve_floor(basis: Tensor, rhs: Tensor) -> Callable[[], Tensor]:
    """Return the two products of a damped application."""
    return lambda: basis @ (basis.mT @ rhs)
