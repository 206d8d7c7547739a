"""EK-FAC against explicit per-sample gradients, and its optimality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import EKFAC, KFAC, Exact
from brandla.kfac.systems.ekfac import EigenvalueCorrected
from kfac.networks import batch, layer_gradient
from kfac.systems import assert_near, fisher, layer_steps, sample_gradients

DAMPING = 0.03
ROUNDING = 1e-10


def curvature(preconditioner: KFAC, index: int = 0) -> EigenvalueCorrected:
    return preconditioner._layers[index].curvature


def parts_of(corrected: EigenvalueCorrected) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """S, d_G, U_G, d_A, U_A."""
    output, input_ = corrected.bases.output.operand(), corrected.bases.input.operand()
    return (corrected.sums / corrected.bases.input.state["total"], *output, *input_)


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("positions", [None, 4])
def test_second_moments_are_those_of_the_samples_own_gradients(
    positions: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("brandla.kfac.systems.ekfac._AT_ONCE", chunk)
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, dtype=torch.float64)
    inputs = torch.randn(*((9,) if positions is None else (9, positions)), 6, dtype=torch.float64)
    weights = torch.randn(*inputs.shape[:-1], 5, dtype=torch.float64)
    preconditioner = KFAC(layer, EKFAC(inverse_every=1))

    def loss(some: slice) -> Tensor:
        return (torch.tanh(layer(inputs[some])) * weights[some]).sum()

    gradients = sample_gradients([layer], lambda index: loss(slice(index, index + 1)), 9)
    (loss(slice(None)) / 9).backward()
    preconditioner.step()
    S, _, left, _, right = parts_of(curvature(preconditioner))
    uses = 9 * (positions or 1)
    expected = uses * sum((left.T @ v @ right).square() for (v,) in gradients)
    assert_near(S, expected, ROUNDING)


def test_no_curvature_with_these_eigenvectors_is_nearer_to_the_fisher_matrix():
    """‖F − F_EKFAC‖_F is that of F's own diagonal, below K-FAC's, and any change of S makes it larger."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, dtype=torch.float64)
    inputs, labels = batch(12, 6, 5)
    preconditioner = KFAC(layer, EKFAC(inverse_every=1))

    def loss(some: slice) -> Tensor:
        return nn.functional.cross_entropy(layer(inputs[some]), labels[some])

    F = fisher(sample_gradients([layer], lambda index: loss(slice(index, index + 1)), 12), 12)
    loss(slice(None)).backward()
    preconditioner.step()
    S, d_G, left, d_A, right = parts_of(curvature(preconditioner))
    # Matrices are flattened row by row: vec(U_G X U_Aᵀ) = (U_G ⊗ U_A) vec(X).
    basis = torch.kron(left, right)

    def distance(values: Tensor) -> float:
        return torch.linalg.matrix_norm(F - (basis * values.reshape(-1)) @ basis.T).item()

    kfac = torch.outer(d_G, d_A)
    assert distance(S) < 0.99 * distance(kfac)
    assert distance(S) < min(distance(S * 1.01), distance(S + 0.01 * S.mean()), distance((S + kfac) / 2))
    torch.testing.assert_close(S.reshape(-1), torch.diagonal(basis.T @ F @ basis))


def test_step_divides_by_second_moments_and_damping():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, dtype=torch.float64)
    inputs, labels = batch(12, 6, 5)
    preconditioner = KFAC(layer, EKFAC(inverse_every=1), damping=DAMPING, clip=None)
    nn.functional.cross_entropy(layer(inputs), labels).backward()
    gradient = layer_gradient(layer)
    preconditioner.step()
    S, d_G, left, d_A, right = parts_of(curvature(preconditioner))
    by_output, by_input = DAMPING * d_G[0], DAMPING * d_A[0]
    divisor = S - torch.outer(d_G, d_A) + torch.outer(d_G + by_output, d_A + by_input)
    assert_near(layer_gradient(layer), left @ ((left.T @ gradient @ right) / divisor) @ right.T, ROUNDING)


@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_step_is_that_of_exact_where_the_fisher_matrix_is_a_kronecker_product(damping: float):
    """A full factorial of inputs and residuals, as in test_step: S = d_G d_Aᵀ, and damping acts alike."""
    steps = {}
    for name, system in {"exact": Exact(inverse_every=1), "corrected": EKFAC(inverse_every=1)}.items():
        torch.manual_seed(0)
        layer = nn.Linear(5, 4, bias=False, dtype=torch.float64)
        inputs = torch.randn(7, 5, dtype=torch.float64).repeat_interleave(4, dim=0)
        targets = layer(inputs).detach() - 2 * torch.eye(4, dtype=torch.float64).repeat(7, 1)
        preconditioner = KFAC(layer, system, damping=damping, clip=None)
        (step_of,) = layer_steps(layer, preconditioner, (0.5 * (layer(inputs) - targets).square().sum(1)).mean())
        steps[name] = step_of
    assert_near(steps["corrected"], steps["exact"], ROUNDING)


def test_a_direction_without_data_gets_the_step_of_exact():
    """Weight decay puts gradient on an input that is never active."""
    steps = []
    for system in (Exact(inverse_every=1), EKFAC(inverse_every=1)):
        torch.manual_seed(0)
        layer = nn.Linear(6, 5, bias=False, dtype=torch.float64)
        inputs = torch.randn(12, 6, dtype=torch.float64)
        inputs[:, 2] = 0
        preconditioner = KFAC(layer, system, damping=DAMPING, clip=None)
        layer(inputs).square().mean().backward()
        layer.weight.grad[:, 2] += 1
        preconditioner.step()
        steps.append(layer.weight.grad[:, 2].clone())
    assert steps[0].abs().min() > 1
    assert_near(steps[1], steps[0], 1e-8)


def test_renewed_eigenvectors_take_over_what_the_old_ones_stood_for():
    """S ← diagonal, in the new basis, of the old curvature: its trace stays, and only the last batch is added to it."""
    layer = nn.Linear(6, 5, dtype=torch.float64)
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    preconditioner = KFAC(layer, EKFAC(inverse_every=2), decay=0.9)
    known = None
    for seed in range(3):
        inputs, labels = batch(12, 6, 5, seed)
        layer.zero_grad()
        outputs = layer(inputs)
        outputs.retain_grad()
        nn.functional.cross_entropy(outputs, labels).backward()
        preconditioner.step()
        _, _, left, _, right = parts_of(curvature(preconditioner))
        basis = torch.kron(left, right)
        rows = torch.cat([inputs, inputs.new_ones(12, 1)], dim=1)
        v = torch.einsum("ni,nj->nij", outputs.grad, rows).reshape(12, -1)
        moments = 12 * (v @ basis).square().sum(0)
        dense = known if known is not None else torch.zeros(35, 35, dtype=torch.float64)
        expected = 0.9 * torch.diagonal(basis.T @ dense @ basis) + 0.1 * moments
        sums = curvature(preconditioner).sums.reshape(-1)
        assert_near(sums, expected, ROUNDING)
        known = (basis * sums) @ basis.T
