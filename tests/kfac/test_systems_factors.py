"""Systems of Kronecker factors: the dense step, tails, sketches, failed factorisations, FOOF; and EK-FAC."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import brandla
from brandla.kfac import EKFAC, KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Foof, Randomized
from brandla.kfac.systems.factor import damped_solves
from brandla.kfac.values import Damping
from builders import dense_operator
from kfac.networks import (
    EXACT,
    assert_near,
    average,
    batch,
    damped_inverse,
    layer_step,
    loss_of,
    mlp,
    stepped,
    weighted,
)
from kfac.systems import factors_of, full_rank, layer_steps, sample_gradients, some_systems

DAMPING = 0.03
FULL_RANK = full_rank(24)


@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("foof", [False, True], ids=["both", "foof"])
@pytest.mark.parametrize("strategy", FULL_RANK.values(), ids=FULL_RANK)
def test_steps_are_those_of_the_dense_average_while_the_rank_holds_all_data(strategy, application, foof):
    """The step is (G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹; FOOF leaves out G. Three batches of 8 have rank 24."""
    layer = mlp(60, 50)[0]
    system = Foof(strategy) if foof else strategy
    preconditioner = KFAC(layer, system, damping=DAMPING, clip=None, application=application)
    # With Cholesky factorisations, d₁ and so the damping are estimated from below.
    by_cholesky = "cholesky" in (getattr(strategy, "compress", ""), getattr(strategy, "method", ""))
    sums, total = [0.0, 0.0], 0.0
    for seed in range(3):
        step = layer_step(layer, preconditioner, batch(8, 60, 50, seed))
        sums, total = [0.95 * old + new for old, new in zip(sums, step.factors, strict=True)], 0.95 * total + 1
        averages = {"input": sums[0] / total, "output": sums[1] / total}
        inverses, rounding = {"output": torch.eye(50, dtype=torch.float64)}, 1e-9 if seed else 1e-12
        for side, factor in preconditioner._layers[0].curvature.factors():
            true, found = torch.linalg.eigvalsh(averages[side])[-1], factor.largest()
            least = (0.7 if seed else 0.8) if by_cholesky else 1 - rounding
            assert least <= found / true <= 1 + rounding
            inverses[side] = damped_inverse(averages[side], DAMPING, found)
        assert_near(step.result, inverses["output"] @ step.gradient @ inverses["input"], 1e-8 if seed else 1e-9)
    sides = [("input", 61)] if foof else [("input", 61), ("output", 50)]
    assert [(row.side, row.n) for row in preconditioner.report().factors] == sides


def trained(strategy, steps, *, count=8, decay=0.95):
    """Train a layer on inputs of spectrum i⁻¹; return its preconditioner, its A, and the dense average of batches."""
    layer = mlp(60, 50, bias=False)[0]
    preconditioner = KFAC(layer, strategy, damping=DAMPING, clip=None, decay=decay)
    dense, total = torch.zeros(60, 60, dtype=torch.float64), 0.0
    for seed in range(steps):
        inputs, labels = batch(count, 60, 50, seed)
        step = layer_step(layer, preconditioner, (inputs / torch.arange(1.0, 61), labels))
        dense, total = decay * dense + step.factors[0], decay * total + 1
    factor = preconditioner._layers[0].curvature.input
    lowrank = factor.form.lowrank(factor.state)
    return preconditioner, lowrank.dense(), dense / total


TRUNCATED = {name: own for name, own in full_rank(16).items() if name == "exact" or name.startswith("brand")}
TRUNCATED["randomized"] = Randomized(16, inverse_every=1)


@pytest.mark.parametrize("tail", ["mean", "smallest", 0.5])
@pytest.mark.parametrize("strategy", TRUNCATED.values(), ids=TRUNCATED)
def test_tail_is_the_value_of_left_out_directions(strategy, tail):
    """τ = (tr M − tr M̂)/(n − r) for "mean", by dense inverses; in a root every value below τ counts as τ."""
    strategy = replace(strategy, tail=tail)
    preconditioner, _, dense = trained(Foof(strategy), 6)
    (factor,) = factors_of(preconditioner)
    kept = strategy.lowrank(factor.state)
    assert kept.rank == 60 or (dense - kept.dense()).trace() > 1e-4 * DAMPING * (60 - kept.rank)
    damped = dense_operator(brandla.Tracked(kept, dense.trace(), dense.trace()), DAMPING, tail)
    block = torch.randn(60, 50, dtype=torch.float64)
    (found,) = damped_solves([factor], [block], Damping(DAMPING, "absolute"))
    torch.testing.assert_close(found, torch.linalg.solve(damped, block))


def test_the_average_of_sketches_tends_to_the_average_of_batches():
    """The sketch has E AΩΩᵀAᵀ/s = AAᵀ, so the error of the mean of t batches falls like 1/√t."""
    errors = []
    for steps in (4, 64):
        _, found, dense = trained(Brand(24, sketch=5), steps, count=24, decay=1 - 1e-9)
        errors.append((found - dense).norm() / dense.norm())
    # Sixteen times the batches give a quarter of the error, within a factor of 1.5 for one draw of each.
    assert errors[1] < 0.375 * errors[0]


@pytest.mark.parametrize(
    ("rank", "count", "options", "others"),
    [
        (6, 24, {"sketch": 24}, {"sketch": None}),
        (6, 63, {}, {"sketch": None}),
        (6, 64, {}, {"sketch": 32}),
        (34, 67, {}, {"sketch": None}),
        (34, 68, {}, {"sketch": 34}),
        (6, 8, {}, {"compress": "eigh"}),
    ],
)
def test_only_wide_batches_are_sketched_and_a_cpu_decomposes_the_core(rank, count, options, others):
    assert torch.equal(*(trained(Brand(rank, **own), 3, count=count)[1] for own in (options, others)))


@some_systems(Exact(), BrandRandomized(6), BrandCorrected(6))
def test_the_dense_average_is_that_of_all_columns_of_all_batches(strategy):
    """It is Σ ρ^(t−i) A_i A_iᵀ / Σ ρ^(t−i), also if the low-rank form gets a sketch."""
    preconditioner, _, dense = trained(strategy, 4, count=96, decay=0.7)
    torch.testing.assert_close(average(preconditioner), dense)
    assert factors_of(preconditioner)[0].state["total"].item() == pytest.approx(1 - 0.7**4)


def test_the_error_bound_of_a_root_holds():
    preconditioner, found, dense = trained(Brand(6), 12, decay=0.9)
    error = torch.linalg.matrix_norm(dense - found, 2).item()
    assert error <= preconditioner.report().factors[0].error_bound <= 25 * error


def test_a_failed_factorisation_leaves_the_last_one():
    strategy = Exact(inverse_every=1, method="cholesky")
    state = strategy.start(5, (2,), torch.float64, torch.device("cpu"))
    state["total"] = torch.ones((), dtype=torch.float64)
    state["dense"] = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1) * 3
    damping = Damping(0.1, "relative")
    strategy.refresh(state, 0, 0, damping)
    good = state["cholesky"].clone()
    # The second matrix of the batch is indefinite.
    state["dense"] = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1) * 7
    state["dense"][1, 2, 2] = -4
    strategy.refresh(state, 1, 0, damping)
    torch.testing.assert_close(state["cholesky"][0], torch.eye(5, dtype=torch.float64) * 7.7**0.5)
    assert torch.equal(state["cholesky"][1], good[1])
    torch.testing.assert_close(state["shift"], torch.tensor([0.7, 0.3], dtype=torch.float64))


def test_tiny_damping_is_lifted_to_the_rounding_of_the_factor():
    """Rank-deficient data in float32, with λ far below its rounding error, is factorised, and the step is finite."""
    layer = mlp(200, 100, dtype=torch.float32)[0]
    preconditioner = KFAC(layer, Exact(inverse_every=1, method="cholesky"), damping=1e-12, clip=None)
    for _ in range(5):
        found = stepped(layer, preconditioner, layer(torch.randn(8, 200)).square().mean())
        assert all(part.isfinite().all() for part in found)
    for row in preconditioner.report().factors:
        assert row.error_bound < 1e-3
        assert row.rank is None


@some_systems("exact", "cholesky", "randomized-eigh")
def test_layers_below_a_head_that_begins_at_zero_are_preconditioned_soon(strategy):
    """Their first gradients are 0. The rate warms up from 0, so their second gradients are 0 too."""
    model = mlp(10, 12, 4)
    nn.init.zeros_(model[2].weight)
    preconditioner = KFAC(model, replace(strategy, inverse_every=50), clip=None)
    for step in range(4):
        stepped(model, preconditioner, loss_of(model, batch(16, 10, 4, step)))
        if step:
            torch.optim.SGD(model.parameters(), 0.1).step()
    assert all((factor.largest() > 0).all() for factor in factors_of(preconditioner))


def test_foof_divides_an_embedding_by_frequencies_and_keeps_gradients_of_scale_and_shift():
    model = nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4)).double()
    preconditioner = KFAC(model, Foof(Exact()), damping=DAMPING, clip=None)
    before, after = layer_steps(model, preconditioner, weighted(model(torch.tensor([0, 0, 0, 2, 2, 5]))))
    frequencies = torch.tensor([3, 0, 2, 0, 0, 1], dtype=torch.float64) / 6
    assert_near(after[0], before[0] / (frequencies + DAMPING * 0.5)[:, None], 1e-12)
    assert torch.equal(after[1], before[1])


# --- EK-FAC, against explicit gradients of samples

ROUNDING = 1e-10


def parts_of(preconditioner):
    """Return S, d_G, U_G, d_A and U_A."""
    corrected = preconditioner._layers[0].curvature
    output, input_ = corrected.bases.output.operand(), corrected.bases.input.operand()
    return (corrected.sums / corrected.bases.input.state["total"], *output, *input_)


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("positions", [None, 4])
def test_second_moments_are_those_of_the_samples_own_gradients(positions, chunk, monkeypatch):
    monkeypatch.setattr("brandla.kfac.systems.ekfac._CHUNK_ENTRIES", chunk)
    layer = mlp(6, 5)[0]
    inputs = torch.randn(*((9,) if positions is None else (9, positions)), 6, dtype=torch.float64)
    weights = torch.randn(*inputs.shape[:-1], 5, dtype=torch.float64)
    preconditioner = KFAC(layer, EKFAC(inverse_every=1))

    def loss(part):
        return (torch.tanh(layer(inputs[part])) * weights[part]).sum()

    (v,) = sample_gradients(layer, loss, 9)
    stepped(layer, preconditioner, loss(slice(None)) / 9)
    S, _, left, _, right = parts_of(preconditioner)
    uses = 9 * (positions or 1)
    assert_near(S, uses * (left.T @ v @ right).square().sum(0), ROUNDING)


def test_step_divides_by_second_moments_and_damping():
    layer = mlp(6, 5)[0]
    preconditioner = KFAC(layer, EKFAC(inverse_every=1), damping=DAMPING, clip=None)
    step = layer_step(layer, preconditioner, batch(12, 6, 5))
    S, d_G, left, d_A, right = parts_of(preconditioner)
    by_output, by_input = DAMPING * d_G[0], DAMPING * d_A[0]
    divisor = S - torch.outer(d_G, d_A) + torch.outer(d_G + by_output, d_A + by_input)
    assert_near(step.result, left @ ((left.T @ step.gradient @ right) / divisor) @ right.T, ROUNDING)


@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_step_is_that_of_exact_if_the_fisher_matrix_is_a_kronecker_product(damping):
    """A full factorial of inputs and residuals has S = d_G d_Aᵀ, and damping has the same effect.

    This includes a direction without data: a penalty adds a gradient for an input that is always 0.
    """
    steps = []
    for system in (EXACT, EKFAC(inverse_every=1)):
        layer = mlp(5, 4, bias=False)[0]
        inputs = torch.randn(7, 5, dtype=torch.float64).repeat_interleave(4, dim=0)
        inputs[:, 2] = 0
        targets = layer(inputs).detach() - 2 * torch.eye(4, dtype=torch.float64).repeat(7, 1)
        preconditioner = KFAC(layer, system, damping=damping, clip=None)
        loss = (0.5 * (layer(inputs) - targets).square().sum(1)).mean() + layer.weight[:, 2].sum()
        steps += layer_steps(layer, preconditioner, loss)[1]
    assert steps[0][:, 2].abs().min() > 1
    assert_near(steps[1], steps[0], 1e-8)


def test_renewed_eigenvectors_keep_the_old_curvature():
    """S becomes the diagonal of the old curvature in the new basis: its trace stays. Then the last batch is added."""
    layer = mlp(6, 5)[0]
    preconditioner = KFAC(layer, EKFAC(inverse_every=2), decay=0.9)
    old = torch.zeros(35, 35, dtype=torch.float64)
    for seed in range(3):
        step = layer_step(layer, preconditioner, batch(12, 6, 5, seed))
        _, _, left, _, right = parts_of(preconditioner)
        basis = torch.kron(left, right)
        v = torch.einsum("ni,nj->nij", step.outputs, step.inputs).reshape(12, -1)
        expected = 0.9 * torch.diagonal(basis.T @ old @ basis) + 0.1 * 12 * (v @ basis).square().sum(0)
        sums = preconditioner._layers[0].curvature.sums.reshape(-1)
        assert_near(sums, expected, ROUNDING)
        old = (basis * sums) @ basis.T
