"""Brand with batches sketched to fewer columns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Strategy
from brandla.kfac.systems.brand import sketch_width
from kfac.networks import batch

# The output factor of order 30 is too small for some of the ranks.
pytestmark = pytest.mark.filterwarnings("ignore:KFAC")


def factor_of(
    layer: nn.Linear, strategy: Brand, steps: int, decay: float, count: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tracked input factor, and the exact average of the same batches."""
    preconditioner = KFAC(layer, strategy, decay=decay)
    dense, total = torch.zeros(40, 40, dtype=torch.float64), 0.0
    for seed in range(steps):
        inputs, labels = batch(count, 40, 30, seed)
        inputs = inputs * torch.arange(1, 41, dtype=torch.float64) ** -1.0
        layer.zero_grad()
        nn.functional.cross_entropy(layer(inputs), labels).backward()
        preconditioner.step()
        dense, total = decay * dense + inputs.T @ inputs / count, decay * total + 1
    return preconditioner._layers[0].curvature.input.operand().dense(), dense / total


@pytest.mark.parametrize("options", [{}, {"compress": "cholesky"}, {"form": "eigh"}], ids=str)
def test_the_average_of_sketches_tends_to_that_of_the_batches(options: dict[str, str]):
    """E AΩΩᵀAᵀ = AAᵀ: the error of the mean of t batches falls as 1/√t."""
    errors = []
    for steps in (4, 64):
        layer = nn.Linear(40, 30, bias=False, dtype=torch.float64)
        kept, exact = factor_of(layer, Brand(24, sketch=5, **options), steps, decay=1 - 1e-9)
        errors.append(float(torch.linalg.matrix_norm(kept - exact) / torch.linalg.matrix_norm(exact)))
    # Sixteen times the batches: a fourth of the error, give or take half for one draw of each.
    assert errors[1] < 0.375 * errors[0]


def test_batches_no_wider_than_the_sketch_are_taken_as_they_are():
    results = []
    for sketch in (24, None):
        torch.manual_seed(0)
        layer = nn.Linear(40, 30, bias=False, dtype=torch.float64)
        results.append(factor_of(layer, Brand(6, sketch=sketch), 3, 0.9)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("rank", "k", "expected"),
    [(4, 63, 63), (4, 64, 32), (40, 79, 79), (40, 80, 40), (128, 10**5, 128), (128, 128, 128)],
)
def test_the_width_of_a_sketch(rank: int, k: int, expected: int):
    assert sketch_width(rank, k) == expected


@pytest.mark.parametrize(("count", "sketch"), [(24, None), (96, 32)], ids=["narrow", "wide"])
def test_only_wide_batches_are_sketched_by_default(count: int, sketch: int | None):
    results = []
    for strategy in (Brand(6), Brand(6, sketch=sketch)):
        torch.manual_seed(0)
        layer = nn.Linear(40, 30, bias=False, dtype=torch.float64)
        results.append(factor_of(layer, strategy, 3, 0.9, count)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("strategy", [BrandRandomized(6), BrandCorrected(6)], ids=["randomized", "corrected"])
def test_the_dense_average_beside_a_sketch_is_that_of_all_columns(strategy: Strategy):
    layer = nn.Linear(40, 30, bias=False, dtype=torch.float64)
    preconditioner = KFAC(layer, strategy)
    inputs, labels = batch(96, 40, 30)
    nn.functional.cross_entropy(layer(inputs), labels).backward()
    preconditioner.step()
    state = preconditioner._layers[0].curvature.input.state
    torch.testing.assert_close(state["dense"] / state["total"], inputs.T @ inputs / 96)
