"""Derivatives of the symmetric updates where eigenvalues of the core coincide: from zeros, of dependent columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import brandla
from builders import EIGH_UPDATE, ROOT_UPDATE, SymmetricUpdate, make_columns

N = 9
COLUMNS, TWO = make_columns(N, 4), make_columns(N, 2)
GIVEN: dict[str, tuple[int | None, Tensor]] = {
    "zeros, more rank than columns": (6, COLUMNS),
    "zeros, as much": (4, COLUMNS),
    "zeros, less": (2, COLUMNS),
    "zeros, columns twice": (4, torch.cat([TWO, TWO], dim=1)),
    "a factor, columns twice": (None, torch.cat([TWO, TWO], dim=1)),
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("update", [EIGH_UPDATE, ROOT_UPDATE], ids=str)
def test_derivatives_by_columns_are_right(update: SymmetricUpdate, name: str) -> None:
    rank, columns = GIVEN[name]
    start = update.make(N, 3, "slow") if rank is None else update.factor.zeros(N, rank, dtype=torch.float64)
    weights = make_columns(N, N, seed=3)

    def loss(columns: Tensor) -> Any:
        return (update(start, columns).dense() * weights).sum()

    assert gradcheck(loss, columns.clone().requires_grad_(), fast_mode=True)


def test_a_damped_likelihood_of_a_stream_from_zeros_has_a_derivative() -> None:
    """Through an update, and then through the spectrum of S, which has zeros."""

    def loss(columns: Tensor) -> Tensor:
        root = brandla.root_update(brandla.LowRankRoot.zeros(N, 6, dtype=torch.float64), columns)
        applied = brandla.damped_power(root, COLUMNS, 0.3, -0.5)
        return applied.square().sum() + brandla.damped_logdet(root, 0.3)

    assert gradcheck(loss, COLUMNS.clone().requires_grad_(), fast_mode=True)
