"""EK-FAC against explicit per-sample gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brandla.kfac import EKFAC, KFAC, Exact
from kfac.networks import batch, layer_step, mlp, stepped
from kfac.systems import assert_near, layer_steps, sample_gradients

DAMPING = 0.03
ROUNDING = 1e-10


def parts_of(preconditioner: KFAC) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """S, d_G, U_G, d_A, U_A."""
    corrected = preconditioner._layers[0].curvature
    output, input_ = corrected.bases.output.operand(), corrected.bases.input.operand()
    return (corrected.sums / corrected.bases.input.state["total"], *output, *input_)


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("positions", [None, 4])
def test_second_moments_are_those_of_the_samples_own_gradients(
    positions: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("brandla.kfac.systems.ekfac._AT_ONCE", chunk)
    layer = mlp(6, 5)[0]
    inputs = torch.randn(*((9,) if positions is None else (9, positions)), 6, dtype=torch.float64)
    weights = torch.randn(*inputs.shape[:-1], 5, dtype=torch.float64)
    preconditioner = KFAC(layer, EKFAC(inverse_every=1))

    def loss(part: slice) -> Tensor:
        return (torch.tanh(layer(inputs[part])) * weights[part]).sum()

    gradients = sample_gradients([layer], loss, 9)
    stepped(layer, preconditioner, loss(slice(None)) / 9)
    S, _, left, _, right = parts_of(preconditioner)
    uses = 9 * (positions or 1)
    assert_near(S, uses * sum((left.T @ v @ right).square() for (v,) in gradients), ROUNDING)


def test_step_divides_by_second_moments_and_damping():
    layer = mlp(6, 5)[0]
    preconditioner = KFAC(layer, EKFAC(inverse_every=1), damping=DAMPING, clip=None)
    step = layer_step(layer, preconditioner, batch(12, 6, 5))
    S, d_G, left, d_A, right = parts_of(preconditioner)
    by_output, by_input = DAMPING * d_G[0], DAMPING * d_A[0]
    divisor = S - torch.outer(d_G, d_A) + torch.outer(d_G + by_output, d_A + by_input)
    assert_near(step.result, left @ ((left.T @ step.gradient @ right) / divisor) @ right.T, ROUNDING)


@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_step_is_that_of_exact_where_the_fisher_matrix_is_a_kronecker_product(damping: float):
    """A full factorial of inputs and residuals, as in test_kinds_step: S = d_G d_Aᵀ, and damping acts alike."""
    steps = []
    for system in (Exact(inverse_every=1), EKFAC(inverse_every=1)):
        layer = mlp(5, 4, bias=False)[0]
        inputs = torch.randn(7, 5, dtype=torch.float64).repeat_interleave(4, dim=0)
        targets = layer(inputs).detach() - 2 * torch.eye(4, dtype=torch.float64).repeat(7, 1)
        preconditioner = KFAC(layer, system, damping=damping, clip=None)
        steps += layer_steps(layer, preconditioner, (0.5 * (layer(inputs) - targets).square().sum(1)).mean())
    assert_near(steps[1], steps[0], ROUNDING)


def test_a_direction_without_data_gets_the_step_of_exact():
    """Weight decay puts gradient on an input that is never active."""
    steps = []
    for system in (Exact(inverse_every=1), EKFAC(inverse_every=1)):
        layer = mlp(6, 5, bias=False)[0]
        inputs = torch.randn(12, 6, dtype=torch.float64)
        inputs[:, 2] = 0
        preconditioner = KFAC(layer, system, damping=DAMPING, clip=None)
        (step,) = layer_steps(layer, preconditioner, layer(inputs).square().mean() + layer.weight[:, 2].sum())
        steps.append(step[:, 2])
    assert steps[0].abs().min() > 1
    assert_near(steps[1], steps[0], 1e-8)


def test_renewed_eigenvectors_take_over_what_the_old_ones_stood_for():
    """S ← diagonal, in the new basis, of the old curvature: its trace stays, and only the last batch is added to it."""
    layer = mlp(6, 5)[0]
    preconditioner = KFAC(layer, EKFAC(inverse_every=2), decay=0.9)
    known = torch.zeros(35, 35, dtype=torch.float64)
    for seed in range(3):
        step = layer_step(layer, preconditioner, batch(12, 6, 5, seed))
        _, _, left, _, right = parts_of(preconditioner)
        basis = torch.kron(left, right)
        v = torch.einsum("ni,nj->nij", step.outputs, step.inputs).reshape(12, -1)
        expected = 0.9 * torch.diagonal(basis.T @ known @ basis) + 0.1 * 12 * (v @ basis).square().sum(0)
        sums = preconditioner._layers[0].curvature.sums.reshape(-1)
        assert_near(sums, expected, ROUNDING)
        known = (basis * sums) @ basis.T
