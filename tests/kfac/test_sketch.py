"""Brand with batches sketched to fewer columns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Brand
from kfac.networks import batch

# The output factor of order 30 is too small for some of the ranks.
pytestmark = pytest.mark.filterwarnings("ignore:KFAC")


def factor_of(layer: nn.Linear, strategy: Brand, steps: int, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tracked input factor, and the exact average of the same batches."""
    preconditioner = KFAC(layer, strategy, decay=decay)
    dense, total = torch.zeros(40, 40, dtype=torch.float64), 0.0
    for seed in range(steps):
        inputs, labels = batch(24, 40, 30, seed)
        inputs = inputs * torch.arange(1, 41, dtype=torch.float64) ** -1.0
        layer.zero_grad()
        nn.functional.cross_entropy(layer(inputs), labels).backward()
        preconditioner.step()
        dense, total = decay * dense + inputs.T @ inputs / 24, decay * total + 1
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


def test_a_sketch_of_no_column_is_refused():
    with pytest.raises(ValueError, match="Brand: sketch must be at least 1; got 0"):
        Brand(8, sketch=0)
