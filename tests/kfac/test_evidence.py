"""The Laplace evidence against dense log determinants, and against the exact evidence of a linear model."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from brandla import Tracked, checked
from brandla.kfac import (
    EKFAC,
    KFAC,
    Brand,
    BrandRandomized,
    ConjugateGradient,
    Exact,
    Foof,
    InverseFree,
    Randomized,
    Strategy,
    evidence,
)
from builders import dense_operator
from kfac.networks import Words, batch, loss_of, mlp, stepped

TERMS = 40

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")


def filled(model: nn.Module, strategy: Strategy, terms: int = TERMS) -> KFAC:
    preconditioner = KFAC(model, strategy, decay=0.0)
    stepped(model, preconditioner, loss_of(model, batch(terms, 10, 4)))
    return preconditioner


def dense_evidence(model: nn.Module, preconditioner: KFAC, traces: KFAC, precisions: list[float]) -> float:
    """By log det of N A ⊗ G + δI with every matrix formed; traces are those of the dense factors."""
    total = -3.0
    for layer, whole, precision in zip(preconditioner._layers, traces._layers, precisions, strict=True):
        trace = {side: own.strategy.average(own.state).trace() for side, own in whole.curvature.factors()}
        A, G = (
            dense_operator(Tracked(own.strategy.lowrank(own.state), trace[side], trace[side]), 0.0, own.strategy.tail)
            for side, own in sorted(layer.curvature.factors())
        )
        F = TERMS * torch.kron(G, A)
        damped = F + precision * torch.eye(len(F), dtype=F.dtype)
        squares = sum(part.square().sum().item() for part in layer.kind.module.parameters())
        total -= 0.5 * (torch.logdet(damped).item() - len(F) * math.log(precision)) + 0.5 * precision * squares
    return total


@pytest.mark.parametrize("tail", [0.0, 0.01, "mean"])
@pytest.mark.parametrize(
    "strategy",
    [Exact(), Randomized(3, oversample=2), Brand(3), Brand(3, form="eigh"), BrandRandomized(3)],
    ids=["exact", "randomized", "brand", "brand-eigh", "brand-randomized"],
)
def test_it_is_the_dense_formula(strategy: Strategy, tail: float | str):
    model = mlp(10, 20, 8, 4)
    preconditioner = filled(model, replace(strategy, tail=tail))
    traces = filled(model, Exact())
    for precision in (torch.tensor(0.7), torch.tensor([0.7, 0.1, 2.0])):
        result = evidence(preconditioner, -3.0, precision, TERMS).item()
        expected = dense_evidence(model, preconditioner, traces, precision.expand(3).tolist())
        assert result == pytest.approx(expected, rel=1e-7)


def test_a_mean_tail_brings_it_near_to_that_of_the_whole_factors():
    """What is left out lowers the evidence; without a tail it is not counted."""
    model = mlp(10, 20, 8, 4)
    whole, none, mean = (
        evidence(filled(model, strategy), -3.0, 0.7, TERMS).item()
        for strategy in (Exact(), Brand(3), Brand(3, tail="mean"))
    )
    assert whole < none
    assert abs(mean - whole) < 0.3 * (none - whole)


def test_the_gradient_is_that_of_finite_differences():
    preconditioner = filled(mlp(10, 20, 4), Brand(6, tail="mean"))

    def of(logarithm: Tensor) -> Tensor:
        return evidence(preconditioner, -3.0, logarithm.exp(), TERMS)

    assert torch.autograd.gradcheck(of, torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True))


def test_the_cholesky_factorisation_and_ekfac_have_eigenvalues_too():
    """One sample a batch: EK-FAC's values are the products."""
    strategies = Exact(inverse_every=1), Exact(method="cholesky"), EKFAC(inverse_every=1)
    results = [evidence(filled(mlp(10, 20, 4), own, 1), -3.0, 0.5, TERMS).item() for own in strategies]
    assert results[1:] == pytest.approx(results[:1] * 2, rel=1e-9)


def test_half_the_digits_leave_the_value_to_their_rounding():
    """Determinants are taken in float64: in float32 a small gain would be lost. Nor does `checked` stop them."""
    model, (inputs, labels), values = mlp(10, 20, 4), batch(TERMS, 10, 4), []
    for dtype in (torch.float64, torch.float32):
        own = deepcopy(model).to(dtype)
        preconditioner = KFAC(own, Brand(3, tail="mean"))
        stepped(own, preconditioner, loss_of(own, (inputs.to(dtype), labels)))
        of_prior = 0.5e4 * sum(weight.double().square().sum().item() for weight in own.parameters())
        with checked():
            values.append(evidence(preconditioner, of_prior, 1e4, TERMS).item())
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_layers_of_every_kind_take_part():
    model = Words(9, 6, 4)
    preconditioner = KFAC(model, Exact())
    stepped(model, preconditioner, loss_of(model, (torch.randint(9, (8, 6)), torch.randint(4, (8,)))))
    values = [evidence(preconditioner, -3.0, precision, 8).item() for precision in (0.1, 1.0)]
    assert all(math.isfinite(value) for value in values)
    assert len(set(values)) == 2


def test_it_is_exact_for_a_linear_model_with_normal_noise():
    """The square is −log p for noise of variance ½. The posterior is normal: Laplace's approximation is no other."""
    layer = mlp(5, 1, bias=False)[0]
    inputs, targets = torch.randn(TERMS, 5, dtype=torch.float64), torch.randn(TERMS, dtype=torch.float64)
    precision, eye = 0.7, torch.eye(TERMS, dtype=torch.float64)
    mode = torch.linalg.solve(2 * inputs.T @ inputs + precision * eye[:5, :5], 2 * inputs.T @ targets)
    layer.weight.data.copy_(mode[None])
    preconditioner = KFAC(layer, Exact(), curvature="type-2")
    outputs = layer(inputs)
    preconditioner.curvature(outputs, loss="mse")
    loss = nn.functional.mse_loss(outputs[:, 0], targets)
    stepped(layer, preconditioner, loss)
    log_likelihood = -TERMS * (loss.detach() + 0.5 * math.log(math.pi))
    exact = torch.distributions.MultivariateNormal(torch.zeros_like(targets), eye / 2 + inputs @ inputs.T / precision)
    result = evidence(preconditioner, log_likelihood, precision, TERMS)
    torch.testing.assert_close(result, exact.log_prob(targets))


@pytest.mark.parametrize("strategy", [Foof(Exact()), InverseFree(), ConjugateGradient()], ids=repr)
def test_other_curvatures_are_refused(strategy: Strategy):
    with pytest.raises(TypeError, match=r"evidence: 0: the strategy must be Exact, EKFAC.*; got"):
        evidence(filled(mlp(10, 20, 4), strategy), -3.0, 1.0, TERMS)


def test_bad_input_is_refused():
    full, empty = filled(mlp(10, 20, 4), Exact()), KFAC(mlp(10, 20, 4), Exact())
    for preconditioner, precision, terms, message in (
        (full, torch.ones(3), TERMS, r"prior_precision must be .* batch shape \(2,\) of the layers; got \(3,\)"),
        (full, 0, TERMS, "evidence: prior_precision must be finite and > 0; got 0"),
        (full, 1.0, 0, "evidence: terms must be at least 1; got 0"),
        (empty, 1.0, TERMS, "evidence: 0 must have data; take steps of KFAC"),
    ):
        with pytest.raises(ValueError, match=message):
            evidence(preconditioner, -3.0, precision, terms)
