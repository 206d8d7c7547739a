"""CG-FAC at convergence against dense solves with A ⊗ G + λI, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, ConjugateGradient
from kfac.networks import batch, layer_gradient, layer_step, loss_of, mlp, stepped
from kfac.systems import assert_near, damped_solve, tensors

DAMPING = 0.03
ABSOLUTE = {"damping": DAMPING, "damping_scale": "absolute", "clip": None}
CONVERGED = 60


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_converged_step_is_the_dense_solve_with_the_latest_batches(batches: int):
    """With weighted means of their A and G."""
    layer = mlp(8, 5)[0]
    preconditioner = KFAC(layer, ConjugateGradient(CONVERGED, batches=batches), decay=0.7, **ABSOLUTE)
    factors = []
    for seed in range(4):
        step = layer_step(layer, preconditioner, batch(10, 8, 5, seed))
        factors = [step.factors, *factors][:batches]
        weights = torch.tensor([0.7**age for age in range(len(factors))], dtype=torch.float64)
        A, G = (
            torch.einsum("b,bij->ij", weights / weights.sum(), torch.stack(side)) for side in zip(*factors, strict=True)
        )
        # Stagnation at about ε κ, κ = 1 + d₁/λ below 1e4.
        assert_near(step.result, damped_solve(torch.kron(G, A), step.gradient, DAMPING), 1e-11)


def test_relative_damping_goes_by_the_product_of_the_largest_eigenvalues():
    """d₁ by power iteration from below: at least 80 % of it here, and the step as near as that leaves it."""
    layer = mlp(8, 5)[0]
    step = layer_step(layer, KFAC(layer, ConjugateGradient(CONVERGED), damping=DAMPING, clip=None), batch(10, 8, 5))
    F = torch.kron(*step.factors[::-1])
    most, least = (damped_solve(F, step.gradient, part * DAMPING * torch.linalg.eigvalsh(F)[-1]) for part in (0.8, 1.0))
    assert least.norm() * (1 - 1e-9) <= step.result.norm() <= most.norm()


def test_error_goes_down_at_least_as_fast_as_the_bound():
    """‖e_m‖_H <= 2 ((√κ − 1)/(√κ + 1))^m ‖e_0‖_H."""
    layer, data, results = mlp(30, 20)[0], batch(40, 30, 20), {}
    for iterations in (2, 5, 10, 20, 200):
        preconditioner = KFAC(layer, ConjugateGradient(iterations), **ABSOLUTE)
        step = layer_step(layer, preconditioner, data)
        results[iterations] = step.result
        preconditioner.remove()
    (A, G), exact = step.factors, results.pop(200)
    root = (1 + torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1] / DAMPING).sqrt()

    def length(error: Tensor) -> float:
        return (error * (G @ error @ A + DAMPING * error)).sum().sqrt().item()

    for iterations, result in results.items():
        bound = 2 * ((root - 1) / (root + 1)) ** iterations * length(exact)
        assert length(result - exact) <= bound + 1e-12 * length(exact)


@pytest.mark.parametrize("iterations", [2, 500])
def test_one_datum_converges_in_two_iterations_and_stays(iterations: int):
    """A ⊗ G + λI has two different eigenvalues. At the solution residual and directions are 0 or rounding: no 0/0."""
    layer, data = mlp(6, 4)[0], batch(1, 6, 4)
    preconditioner = KFAC(layer, ConjugateGradient(iterations), damping=DAMPING, clip=None)
    step = layer_step(layer, preconditioner, data)
    extra = torch.randn(4, 6, dtype=torch.float64)
    stepped(layer, preconditioner, loss_of(layer, data) + (extra * layer.weight).sum())
    F = torch.kron(*step.factors[::-1])
    gradient = step.gradient + nn.functional.pad(extra, (0, 1))
    assert_near(layer_gradient(layer), damped_solve(F, gradient, DAMPING * torch.linalg.eigvalsh(F)[-1]), 1e-10)
    assert not any(part.any() for part in stepped(layer, preconditioner, 0 * layer(data[0]).sum()))


def test_warm_start_goes_on_from_the_last_step():
    """With the same batch again and again, a few iterations a step get to where many get at once."""
    layer, data = mlp(30, 20)[0], batch(40, 30, 20)
    errors = {}
    for warm in (False, True):
        strategy = ConjugateGradient(iterations=4, warm_start=warm)
        preconditioner = KFAC(layer, strategy, damping=1e-3, clip=None, decay=0.0)
        for _ in range(30):
            step = layer_step(layer, preconditioner, data)
        F = torch.kron(*step.factors[::-1])
        expected = damped_solve(F, step.gradient, 1e-3 * torch.linalg.eigvalsh(F)[-1])
        errors[warm] = (step.result - expected).norm() / expected.norm()
        preconditioner.remove()
    assert errors[True] < 0.2 * errors[False]


def test_memory_is_that_of_rows_and_grows_only_with_larger_batches():
    layer = mlp(30, 20)[0]
    preconditioner = KFAC(layer, ConjugateGradient(batches=2))
    sizes = []
    for seed, count in enumerate((6, 6, 6, 4, 10, 10)):
        layer_step(layer, preconditioner, batch(count, 30, 20, seed))
        state = preconditioner._layers[0].curvature.state
        sizes.append([len(state[f"{side} weights"]) for side in ("input", "output")])
    assert sizes == [[6, 6], [12, 12], [12, 12], [12, 12], [20, 20], [20, 20]]
    assert sum(part.numel() for part in tensors(preconditioner)) == 20 * (31 + 1) + 20 * (20 + 1)
