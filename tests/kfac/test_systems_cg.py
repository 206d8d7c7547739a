"""CG-FAC at convergence against dense solves with A ⊗ G + λI, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, ConjugateGradient
from brandla.kfac.systems.cg import RowsOfBatches
from kfac.networks import batch, layer_gradient, with_one
from kfac.systems import assert_near

DAMPING = 0.03
CONVERGED = 60


def dense_step(
    factors: list[tuple[Tensor, Tensor]],
    weights: list[float],
    gradient: Tensor,
    damping: float,
    *,
    relative: bool = True,
) -> Tensor:
    """(A ⊗ G + λ I)⁻¹ of weighted means of (A, G), with λ = damping, or damping · d₁(A) d₁(G)."""
    A, G = (
        sum(weight * pair[side] for weight, pair in zip(weights, factors, strict=True)) / sum(weights)
        for side in range(2)
    )
    F = torch.kron(G, A)
    shift = damping * torch.linalg.eigvalsh(F)[-1] if relative else damping
    eye = torch.eye(len(F), dtype=F.dtype)
    return torch.linalg.solve(F + shift * eye, gradient.reshape(-1)).reshape(gradient.shape)


def factors_of(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    rows = with_one(inputs)
    return rows.T @ rows / len(rows), outputs.grad.T @ outputs.grad * len(rows)


def backward(layer: nn.Linear, count: int, seed: int) -> tuple[Tensor, Tensor]:
    inputs, labels = batch(count, layer.in_features, layer.out_features, seed)
    layer.zero_grad()
    outputs = layer(inputs)
    outputs.retain_grad()
    nn.functional.cross_entropy(outputs, labels).backward()
    return inputs, outputs


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_converged_step_is_the_dense_solve_with_the_latest_batches(batches: int):
    torch.manual_seed(0)
    layer = nn.Linear(8, 5, dtype=torch.float64)
    preconditioner = KFAC(
        layer,
        ConjugateGradient(CONVERGED, batches=batches),
        damping=DAMPING,
        damping_scale="absolute",
        clip=None,
        decay=0.7,
    )
    factors = []
    for seed in range(4):
        inputs, outputs = backward(layer, 10, seed)
        factors.insert(0, factors_of(inputs, outputs))
        gradient = layer_gradient(layer)
        preconditioner.step()
        kept = factors[:batches]
        expected = dense_step(kept, [0.7**age for age in range(len(kept))], gradient, DAMPING, relative=False)
        # Stagnation at about ε κ, κ = 1 + d₁/λ below 1e4.
        assert_near(layer_gradient(layer), expected, 1e-11)


def test_relative_damping_goes_by_the_product_of_the_largest_eigenvalues():
    """d₁ by power iteration from below: at least 80 % of it here, and the step as near as that leaves it."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 5, dtype=torch.float64)
    preconditioner = KFAC(layer, ConjugateGradient(CONVERGED), damping=DAMPING, clip=None)
    inputs, outputs = backward(layer, 10, 0)
    gradient = layer_gradient(layer)
    preconditioner.step()
    result, factors = layer_gradient(layer), [factors_of(inputs, outputs)]
    most, least = (dense_step(factors, [1.0], gradient, part * DAMPING) for part in (0.8, 1.0))
    assert least.norm() * (1 - 1e-9) <= result.norm() <= most.norm()


def test_error_goes_down_at_least_as_fast_as_the_bound():
    """‖e_m‖_H <= 2 ((√κ − 1)/(√κ + 1))^m ‖e_0‖_H."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, dtype=torch.float64)
    results = {}
    for iterations in (2, 5, 10, 20, 200):
        preconditioner = KFAC(
            layer, ConjugateGradient(iterations), damping=DAMPING, damping_scale="absolute", clip=None
        )
        inputs, outputs = backward(layer, 40, 0)
        A, G = factors_of(inputs, outputs)
        preconditioner.step()
        results[iterations] = layer_gradient(layer)
        preconditioner.remove()
    exact = results.pop(200)
    root = (1 + torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1] / DAMPING).sqrt()

    def length(error: Tensor) -> float:
        return (error * (G @ error @ A + DAMPING * error)).sum().sqrt().item()

    for iterations, result in results.items():
        bound = 2 * ((root - 1) / (root + 1)) ** iterations * length(exact)
        assert length(result - exact) <= bound + 1e-12 * length(exact)


@pytest.mark.parametrize("iterations", [2, 500])
def test_one_datum_converges_in_two_iterations_and_stays(iterations: int):
    """A ⊗ G + λI has two different eigenvalues. At the solution residual and directions are 0 or rounding: no 0/0."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    preconditioner = KFAC(layer, ConjugateGradient(iterations), damping=DAMPING, clip=None)
    inputs, outputs = backward(layer, 1, 0)
    layer.weight.grad += torch.randn(4, 6, dtype=torch.float64)
    gradient = layer_gradient(layer)
    preconditioner.step()
    expected = dense_step([factors_of(inputs, outputs)], [1.0], gradient, DAMPING)
    assert_near(layer_gradient(layer), expected, 1e-10)
    layer.zero_grad()
    (layer(inputs) * 0).sum().backward()
    preconditioner.step()
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight.grad))


def test_warm_start_goes_on_from_the_last_step():
    """With the same batch again and again, a few iterations a step get to where many get at once."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, dtype=torch.float64)
    options = {"damping": 1e-3, "clip": None, "decay": 0.0}
    inputs, outputs = backward(layer, 40, 0)
    gradient = layer_gradient(layer)
    expected = dense_step([factors_of(inputs, outputs)], [1.0], gradient, 1e-3)
    errors = {}
    for warm in (False, True):
        preconditioner = KFAC(layer, ConjugateGradient(iterations=4, warm_start=warm), **options)
        for _ in range(30):
            backward(layer, 40, 0)
            preconditioner.step()
        errors[warm] = float((layer_gradient(layer) - expected).norm() / expected.norm())
        preconditioner.remove()
    assert errors[True] < 0.2 * errors[False]


def test_memory_is_that_of_rows_and_grows_only_with_larger_batches():
    layer = nn.Linear(30, 20, dtype=torch.float64)
    preconditioner = KFAC(layer, ConjugateGradient(batches=2))
    sizes = []
    for seed, count in enumerate((6, 6, 6, 4, 10, 10)):
        backward(layer, count, seed)
        preconditioner.step()
        curvature: RowsOfBatches = preconditioner._layers[0].curvature
        sizes.append([len(curvature.state[f"{side} weights"]) for side in ("input", "output")])
    assert sizes == [[6, 6], [12, 12], [12, 12], [12, 12], [20, 20], [20, 20]]
    assert sum(part.numel() for part in curvature.tensors()) == 20 * (31 + 1) + 20 * (20 + 1)


@pytest.mark.filterwarnings("ignore:KFAC. a batch was skipped")
def test_a_skipped_batch_pushes_out_nothing():
    layer = nn.Linear(6, 4, dtype=torch.float64)
    preconditioner = KFAC(layer, ConjugateGradient(batches=2, warm_start=True))
    states = []
    for seed, poison in enumerate((False, False, True)):
        inputs, labels = batch(5, 6, 4, seed)
        layer.zero_grad()
        nn.functional.cross_entropy(layer(inputs * float("nan") if poison else inputs), labels).backward()
        preconditioner.step()
        states.append([part.clone() for part in preconditioner._layers[0].curvature.tensors()])
    assert all(torch.equal(one, other) for one, other in zip(states[1], states[2], strict=True))
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight.grad))
