"""FOOF: the input side of K-FAC alone, with any system of factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Brand, Exact, Foof, Randomized
from kfac.networks import batch, damped_inverse, gradients, layer_gradient, loss_of, mlp, stepped, with_one
from kfac.systems import assert_near

DAMPING = 0.03
SYSTEMS = {
    "exact": Exact(inverse_every=1),
    "cholesky": Exact(inverse_every=1, method="cholesky"),
    "randomized": Randomized(30, inverse_every=1),
    "brand": Brand(12),
    "brand-cholesky": Brand(12, compress="cholesky"),
    "brand-eigh": Brand(12, form="eigh"),
}
# What the estimate of the largest eigenvalue from below may do to the damping, and with it to the step.
ESTIMATED = {"cholesky", "brand-cholesky"}


@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.filterwarnings("ignore:KFAC")
def test_step_is_the_gradient_times_the_damped_inverse_of_the_inputs(name: str, application: str):
    torch.manual_seed(0)
    layer = nn.Linear(50, 20, dtype=torch.float64)
    inputs, labels = batch(12, 50, 20)
    preconditioner = KFAC(layer, Foof(SYSTEMS[name]), damping=DAMPING, clip=None, application=application)
    nn.functional.cross_entropy(layer(inputs), labels).backward()
    gradient = layer_gradient(layer)
    preconditioner.step()
    rows = with_one(inputs)
    expected = gradient @ damped_inverse(rows.T @ rows / 12, DAMPING)
    assert_near(layer_gradient(layer), expected, 0.05 if name in ESTIMATED else 1e-9)


def test_the_pair_of_a_thin_batch_is_solved_with_as_a_pair():
    """The linear application is what `auto` takes here, for a network and for several steps, with the same result."""
    results, seen = [], []
    for application in ("auto", "two-sided"):
        model = mlp(40, 50, 30, 20)
        preconditioner = KFAC(model, Foof(Brand(16)), application=application)
        for seed in range(3):
            stepped(model, preconditioner, loss_of(model, batch(8, 40, 4, seed)))
        results.append(gradients(model))
        seen.append([layer.linear for layer in preconditioner._layers])
    assert seen == [[True] * 3, [None] * 3]
    torch.testing.assert_close(results[0], results[1])


def test_only_input_factors_are_kept():
    model = mlp(40, 50, 30, 4)
    preconditioner = KFAC(model, Foof(Brand(8)))
    stepped(model, preconditioner, loss_of(model, batch(8, 40, 4)))
    rows = [(row.side, row.n) for row in preconditioner.report().factors]
    assert rows == [("input", 41), ("input", 51), ("input", 31)]


def test_scale_and_shift_of_a_normalisation_keep_their_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    inputs, labels = batch(12, 6, 3)
    preconditioner = KFAC(model, Foof(Exact()), clip=None)
    nn.functional.cross_entropy(model(inputs), labels).backward()
    before = gradients(model)
    preconditioner.step()
    after = gradients(model)
    same = list(map(torch.equal, before, after))
    assert same == [False, False, True, True, False, False]


def test_embedding_is_divided_by_frequencies():
    model = nn.Embedding(6, 4, dtype=torch.float64)
    indices = torch.tensor([0, 0, 0, 2, 2, 5])
    preconditioner = KFAC(model, Foof(Exact()), damping=DAMPING, clip=None)
    (model(indices) * torch.randn(6, 4, dtype=torch.float64)).sum().backward()
    gradient = model.weight.grad.clone()
    preconditioner.step()
    frequencies = torch.tensor([3, 0, 2, 0, 0, 1], dtype=torch.float64) / 6
    assert_near(model.weight.grad, gradient / (frequencies + DAMPING * 0.5)[:, None], 1e-12)
