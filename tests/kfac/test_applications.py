"""Applications: the Laplace evidence against dense log determinants, and K-FAC for PINNs against dense blocks."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import jacrev

from brandla import Tracked, checked
from brandla.kfac import (
    EKFAC,
    KFAC,
    PINN,
    Brand,
    BrandRandomized,
    Columns,
    ConjugateGradient,
    Exact,
    Foof,
    InverseFree,
    Randomized,
    evidence,
    forward_laplacian,
)
from builders import dense_operator
from kfac.networks import EXACT, Words, assert_equal, assert_near, average, batch, layer_gradient, loss_of, mlp, stepped
from kfac.systems import damped_solve, some_systems

# --- The evidence

TERMS = 40


def with_data(model, strategy, terms=TERMS):
    preconditioner = KFAC(model, strategy, decay=0.0)
    stepped(model, preconditioner, loss_of(model, batch(terms, 10, 4)))
    return preconditioner


def dense_evidence(model, preconditioner, traces, precisions):
    """Return the evidence with N A ⊗ G + δI formed; ``traces`` is a preconditioner with the dense factors."""
    total = -3.0
    for index, (layer, precision) in enumerate(zip(preconditioner._layers, precisions, strict=True)):
        trace = {side: average(traces, side, index).trace() for side in ("input", "output")}
        A, G = (
            dense_operator(Tracked(own.form.lowrank(own.state), trace[side], trace[side]), 0.0, own.form.tail)
            for side, own in sorted(layer.curvature.factors())
        )
        F = TERMS * torch.kron(G, A)
        damped = F + precision * torch.eye(len(F), dtype=F.dtype)
        squares = sum(part.square().sum().item() for part in layer.kind.module.parameters())
        total -= 0.5 * (torch.logdet(damped).item() - len(F) * math.log(precision)) + 0.5 * precision * squares
    return total


@pytest.mark.parametrize("tail", [0.0, 0.01, "mean"])
@some_systems(Exact(), Randomized(3, oversample=2), Brand(3), Brand(3, form="eigh"), BrandRandomized(3))
def test_evidence_is_the_dense_formula(strategy, tail):
    model = mlp(10, 20, 8, 4)
    preconditioner = with_data(model, replace(strategy, tail=tail))
    traces = with_data(mlp(10, 20, 8, 4), Exact())
    for precision in (torch.tensor(0.7), torch.tensor([0.7, 0.1, 2.0])):
        result = evidence(preconditioner, -3.0, precision, TERMS).item()
        expected = dense_evidence(model, preconditioner, traces, precision.expand(3).tolist())
        assert result == pytest.approx(expected, rel=1e-7)


def test_the_gradient_is_that_of_finite_differences():
    preconditioner = with_data(mlp(10, 20, 4), Brand(6, tail="mean"))

    def of_log_precision(logarithm):
        return evidence(preconditioner, -3.0, logarithm.exp(), TERMS)

    logarithms = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_log_precision, logarithms)


def test_the_cholesky_factorisation_and_ekfac_have_eigenvalues_too():
    """For a batch of one sample, EK-FAC's values are the products."""
    strategies = EXACT, Exact(method="cholesky"), EKFAC(inverse_every=1)
    results = [evidence(with_data(mlp(10, 20, 4), own, 1), -3.0, 0.5, TERMS).item() for own in strategies]
    assert results[1:] == pytest.approx(results[:1] * 2, rel=1e-9)


def test_factors_in_float32_change_the_value_by_rounding_only():
    """Determinants are in float64, because float32 would lose a small gain. `checked` does not refuse them."""
    model, (inputs, labels), values = mlp(10, 20, 4), batch(TERMS, 10, 4), []
    for dtype in (torch.float64, torch.float32):
        copied = copy.deepcopy(model).to(dtype)
        preconditioner = KFAC(copied, Brand(3, tail="mean"))
        stepped(copied, preconditioner, loss_of(copied, (inputs.to(dtype), labels)))
        of_prior = 0.5e4 * sum(weight.double().square().sum().item() for weight in copied.parameters())
        with checked():
            values.append(evidence(preconditioner, of_prior, 1e4, TERMS).item())
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_evidence_takes_layers_of_every_kind():
    model = Words(9, 6, 4)
    preconditioner = KFAC(model, Exact())
    stepped(model, preconditioner, loss_of(model, (torch.randint(9, (8, 6)), torch.randint(4, (8,)))))
    values = [evidence(preconditioner, -3.0, precision, 8).item() for precision in (0.1, 1.0)]
    assert all(math.isfinite(value) for value in values)
    assert len(set(values)) == 2


def test_evidence_is_exact_for_a_linear_model_with_normal_noise():
    """The square is −log p for noise of variance ½. The posterior is normal, so Laplace's approximation is exact."""
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


# --- Physics-informed networks: the forward Laplacian against autograd's, and dense Gauss–Newton blocks

DAMPING = 1e-3


def network(*activations):
    torch.manual_seed(0)
    layers = [part for index, own in enumerate(activations) for part in (nn.Linear(5 if index else 2, 5), own)]
    return nn.Sequential(*layers, nn.Linear(5, 1)).double()


def points(count, seed=1):
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def residual(u, x):
    """Return a residual that depends on all columns."""
    return u.laplacian[:, 0] + u.value[:, 0].sin() * u.gradient[:, 0, 1] - x[:, 0]


def at_boundary(u, x):
    return u[:, 0] - x.sum(1)


ONES = torch.ones(2, dtype=torch.float64)
PROBLEM = points(7), residual, points(4, 2).round(), at_boundary


def columns_at(function, x, weights=ONES):
    """Return the value, derivatives and Laplacian of each output at one point by autograd, as rows."""
    laplacian = jacrev(jacrev(function))(x).diagonal(dim1=-2, dim2=-1) @ weights
    return torch.cat([function(x)[None], jacrev(function)(x).T, laplacian[None]])


@pytest.mark.parametrize("kind", [nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.Mish])
@pytest.mark.parametrize("weights", [(), (torch.tensor([0.0, 3.0], dtype=torch.float64),)], ids=["ones", "weights"])
def test_columns_are_those_of_autograd(kind, weights):
    model, x = network(kind(), kind()), points(6)
    value, gradient, laplacian = forward_laplacian(model, x, *weights)
    expected = torch.stack([columns_at(model, row, *weights) for row in x])
    torch.testing.assert_close(torch.cat([value[:, None], gradient.mT, laplacian[:, None]], dim=1), expected)


def dense_factors(model, index):
    """Return (A, B) of a layer inside and at the boundary: z by autograd, and g from shifts of each column."""
    before, linear, after = model[:index], model[index], model[index + 1 :]
    rows = []
    for x, is_inside in ((PROBLEM[0], True), (PROBLEM[2], False)):
        A, B = 0, 0
        for row in x:
            z = columns_at(before, row)[: None if is_inside else 1]
            z = torch.cat([z, torch.eye(len(z), 1, dtype=z.dtype)], dim=1).detach()
            out = (z[:, :-1] @ linear.weight.T + z[:, -1:] * linear.bias).detach().requires_grad_()

            def after_layer(shift, out=out):
                """Return the later layers' output for a paraboloid that has these columns."""
                return after(out[0] + shift @ out[1:-1] + out[-1] * shift.square().sum() / 4)

            if is_inside:
                u = columns_at(after_layer, torch.zeros_like(row))
                r = residual(Columns(u[:1], u[1:-1].T[None], u[-1:]), row[None]).sum()
            else:
                r = at_boundary(after(out), row[None]).sum()
            (g,) = torch.autograd.grad(r, out)
            A, B = A + z.T @ z / (len(x) * len(z)), B + g.T @ g / len(x)
        rows.append([A, B])
    return rows


@pytest.mark.parametrize("index", [0, 2, 4])
def test_the_step_solves_with_the_sum_of_the_dense_products(index):
    model = network(nn.Tanh(), nn.Tanh())
    x, _, y, _ = PROBLEM
    loss = (residual(forward_laplacian(model, x), x).square().mean() + at_boundary(model(y), y).square().mean()) / 2
    loss.backward()
    gradient = layer_gradient(model[index])
    model.zero_grad()
    total = 0
    for A, B in dense_factors(model, index):
        damped = (part + DAMPING * torch.eye(len(part), dtype=part.dtype) for part in (B, A))
        total = total + torch.kron(*damped)
    preconditioner = PINN(model, damping=DAMPING)
    for found in (preconditioner.loss(*PROBLEM), preconditioner.backward(*PROBLEM)):
        torch.testing.assert_close(found, loss.detach())
    assert_near(layer_gradient(model[index]), damped_solve(total, gradient), 1e-7)


def test_the_factors_of_a_system_are_the_mean_and_the_sum_of_both_terms():
    model = network(nn.Tanh(), nn.Tanh())
    preconditioner = PINN(model, EXACT, damping=DAMPING)
    (A, B), (A_boundary, B_boundary) = dense_factors(model, 2)
    preconditioner.backward(*PROBLEM)
    found = {side: own.form.average(own.state) for side, own in preconditioner.curvatures[1].factors()}
    torch.testing.assert_close(found["input"], (A + A_boundary) / 2)
    torch.testing.assert_close(found["output"], B + B_boundary)


@pytest.mark.parametrize("inverse", [None, Brand(2, form="eigh"), Exact()], ids=["sum", "brand", "exact"])
def test_training_goes_on_bit_equal_and_a_state_without_data_clears_the_curvatures(inverse):
    model = network(nn.Tanh(), nn.Tanh())
    preconditioner = PINN(model, inverse, damping=DAMPING)
    without_data = copy.deepcopy(preconditioner.state_dict())

    def step(trained, with_preconditioner, seed):
        with_preconditioner.backward(points(7, seed), *PROBLEM[1:])
        torch.optim.SGD(trained.parameters(), 1e-4).step()

    for seed in range(2):
        step(model, preconditioner, seed)
    other = copy.deepcopy(model)
    resumed = PINN(other, inverse, damping=DAMPING)
    resumed.load_state_dict(copy.deepcopy(preconditioner.state_dict()))
    for seed in (2, 3):
        step(model, preconditioner, seed)
        step(other, resumed, seed)
    assert_equal(model, other)
    resumed.load_state_dict(without_data)
    assert not any(curvature.started for curvature in resumed.curvatures)


def test_the_report_of_the_sum_has_a_row_for_each_side_and_non_finite_points_change_no_factor():
    model = network(nn.Tanh(), nn.Tanh()).float()
    preconditioner = PINN(model, damping=DAMPING)
    assert {row.reason for row in preconditioner.report().factors} == {"no data yet"}
    problem = PROBLEM[0].float(), residual, PROBLEM[2].float(), at_boundary
    preconditioner.backward(*problem)
    known = [own.state["interior input"] / own.state["total"] for own in preconditioner.curvatures]
    preconditioner.backward(problem[0] * float("nan"), *problem[1:])
    assert not any(parameter.grad.any() for parameter in model.parameters())
    found = [own.state["interior input"] / own.state["total"] for own in preconditioner.curvatures]
    torch.testing.assert_close(found, known)
    report = preconditioner.report()
    orders = [("0", "input", 3), ("0", "output", 5), ("2", "input", 6), ("2", "output", 5)]
    assert [(row.layer, row.side, row.n) for row in report.factors] == [*orders, ("4", "input", 6), ("4", "output", 1)]
    # Each side has two matrices in float64; the input side also has the total of the weights.
    assert [row.bytes for row in report.factors[:2]] == [8 * (2 * 3**2 + 1), 8 * 2 * 5**2]
    assert [row.dense_bytes for row in report.factors[:2]] == [8 * 3**2, 8 * 5**2]
    assert report.skipped == 1
    # A point inside has d + 2 rows, in float32.
    assert report.captured_bytes == 4 * (7 * 4 + 4) * (3 + 5 + 6 + 5 + 6 + 1)
    assert "SumOfTwo" in str(report)
    assert "inside and at the boundary" in str(report)


def test_the_report_of_factors_gives_their_strategies():
    preconditioner = PINN(network(nn.Tanh(), nn.Tanh()), Brand(3), damping=DAMPING)
    preconditioner.backward(*PROBLEM)
    rows = {(row.layer, row.side): row for row in preconditioner.report().factors}
    assert (rows["2", "input"].rank, rows["2", "input"].strategy) == (3, str(Brand(3)))
    assert rows["2", "input"].error_bound > 0
    assert rows["4", "output"].reason == "rank 3 takes no less memory than the matrix of order n = 1"
    assert sum(row.bytes for row in rows.values()) == preconditioner.report().bytes


# --- What is refused


def evidence_of(strategy=EXACT, precision=1.0, terms=TERMS, started=True):
    model = mlp(10, 20, 4)
    return evidence(with_data(model, strategy) if started else KFAC(model, strategy), -3.0, precision, terms)


def load_other_state(model, inverse=None):
    """Load the state of another network."""
    preconditioner = PINN(network(nn.Tanh()))
    preconditioner.backward(*PROBLEM)
    PINN(model, inverse).load_state_dict(preconditioner.state_dict())


OTHER, NARROW = network(nn.Tanh()), nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
COLUMNS = PROBLEM[0], lambda u, x: u.value, *PROBLEM[2:]
KIND = r"evidence: 0: the strategy must be Exact, EKFAC.*; got"
REFUSED = [
    *((partial(evidence_of, own), TypeError, KIND) for own in (Foof(Exact()), InverseFree(), ConjugateGradient())),
    (partial(evidence_of, precision=torch.ones(3)), ValueError, r"must be .* batch shape \(2,\) of the layers; got"),
    (partial(evidence_of, precision=0), ValueError, "evidence: prior_precision must be finite and > 0; got 0"),
    (partial(evidence_of, terms=0), ValueError, "evidence: terms must be at least 1; got 0"),
    (partial(evidence_of, started=False), ValueError, "evidence: 0 must have data; take steps of KFAC"),
    (partial(load_other_state, OTHER, Exact()), ValueError, r"must be that of Exact\(.*\) of 2 layers; got None of 2"),
    (partial(load_other_state, NARROW), ValueError, r"0: interior input must have shape \(2, 2\); got \(3, 3\)"),
    (lambda: PINN(network(nn.Tanh())).backward(*COLUMNS), ValueError, r"shape \(N,\) = \(7,\), .*; got \(7, 1\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
