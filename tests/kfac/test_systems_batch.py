"""Systems that solve with rows of batches, against dense solves with A ⊗ G + λI and with F = N Σ v vᵀ."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Brand, ConjugateGradient, Foof, TwoLevel, Woodbury
from brandla.kfac.systems.samples import Samples
from brandla.kfac.values import Damping, Now
from kfac.networks import (
    DENSE,
    EXACT,
    Words,
    assert_near,
    batch,
    gradients,
    layer_gradient,
    layer_step,
    loss_of,
    mlp,
    pooled,
    stepped,
    with_one,
)
from kfac.systems import damped_solve, layer_steps, sample_gradients, some_systems, tensors

DAMPING = DENSE["damping"]
CONVERGED = ConjugateGradient(60)

both_applications = pytest.mark.parametrize("application", ["auto", "two-sided"])
both_spaces = pytest.mark.parametrize("space", ["nicolaides", "residual"])


def flat(matrices):
    return torch.cat([matrix.reshape(-1) for matrix in matrices])


def gradients_by_sample(model, data):
    """Return by layer v of each sample, by autograd, as rows."""
    found = sample_gradients(model, lambda part: loss_of(model, (data[0][part], data[1][part])), len(data[1]))
    return [v.flatten(1) for v in found]


def fishers(model, data):
    """Return N Σ v vᵀ of each layer."""
    return [len(v) * v.T @ v for v in gradients_by_sample(model, data)]


def fisher(model, data, uses=()):
    """Return D (Σ v vᵀ) D of all layers, with √N of each layer on D's diagonal. N counts positions, as in A and G."""
    parts = gradients_by_sample(model, data)
    rows = torch.cat([v * n**0.5 for v, n in zip(parts, uses or map(len, parts), strict=True)], dim=1)
    return rows.T @ rows


def words(count=8, seed=0):
    """Return indices and labels for `Words`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, (count, 5), generator=generator), torch.randint(3, (count,), generator=generator)


@pytest.mark.parametrize(("strategy", "least"), [(CONVERGED, 0.8), (Woodbury(), 0.9)], ids=["cg", "woodbury"])
def test_relative_damping_goes_by_the_largest_eigenvalue(strategy, least):
    """Power iteration estimates d₁ from below, so the step lies between two bounds."""
    layer, data = mlp(8, 5)[0], batch(10, 8, 5)
    (F,) = fishers(layer, data)
    step = layer_step(layer, KFAC(layer, strategy, damping=DAMPING, clip=None), data)
    if strategy is CONVERGED:
        F = torch.kron(*step.factors[::-1])
    shifts = (part * DAMPING * torch.linalg.eigvalsh(F)[-1] for part in (least, 1.0))
    longest, shortest = (damped_solve(F, step.gradient, shift) for shift in shifts)
    assert shortest.norm() * (1 - 1e-9) <= step.result.norm() <= longest.norm()


# --- CG-FAC


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_converged_step_is_the_dense_solve_with_the_latest_batches(batches):
    """A and G are weighted means over these batches."""
    layer = mlp(8, 5)[0]
    preconditioner = KFAC(layer, ConjugateGradient(60, batches=batches), decay=0.7, **DENSE)
    factors = []
    for seed in range(4):
        step = layer_step(layer, preconditioner, batch(10, 8, 5, seed))
        factors = [step.factors, *factors][:batches]
        weights = torch.tensor([0.7**age for age in range(len(factors))], dtype=torch.float64)
        weights /= weights.sum()
        A, G = (torch.einsum("b,bij->ij", weights, torch.stack(side)) for side in zip(*factors, strict=True))
        # The iteration stagnates at about ε κ, where κ = 1 + d₁/λ is below 1e4.
        assert_near(step.result, damped_solve(torch.kron(G, A), step.gradient, DAMPING), 1e-11)


def test_converged_step_is_the_dense_solve_with_the_exact_hessian_of_the_loss():
    """Each input then has several gradients, and counts once in A."""
    layer, (inputs, labels) = mlp(8, 5)[0], batch(10, 8, 5)
    preconditioner = KFAC(layer, CONVERGED, curvature="type-2", **DENSE)
    outputs = layer(inputs)
    preconditioner.curvature(outputs)
    nn.functional.cross_entropy(outputs, labels).backward()
    gradient = layer_gradient(layer)
    preconditioner.step()
    p, rows = outputs.detach().softmax(1), with_one(inputs)
    G = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    expected = damped_solve(torch.kron(G, rows.T @ rows / len(rows)), gradient, DAMPING)
    assert_near(layer_gradient(layer), expected, 1e-11)


@pytest.mark.parametrize("iterations", [2, 500])
def test_one_datum_converges_in_two_iterations_and_stays(iterations):
    """A ⊗ G + λI has two different eigenvalues. At the solution residuals are 0 or rounding, and 0/0 must not occur."""
    layer, data = mlp(6, 4)[0], batch(1, 6, 4)
    preconditioner = KFAC(layer, ConjugateGradient(iterations), damping=DAMPING, clip=None)
    step = layer_step(layer, preconditioner, data)
    extra = torch.randn(4, 6, dtype=torch.float64)
    stepped(layer, preconditioner, loss_of(layer, data) + (extra * layer.weight).sum())
    F = torch.kron(*step.factors[::-1])
    gradient = step.gradient + nn.functional.pad(extra, (0, 1))
    assert_near(layer_gradient(layer), damped_solve(F, gradient, DAMPING * torch.linalg.eigvalsh(F)[-1]), 1e-10)
    assert not any(part.any() for part in stepped(layer, preconditioner, 0 * layer(data[0]).sum()))


def test_warm_start_continues_from_the_last_step():
    """If the batch repeats, a few iterations per step reach the result of many iterations."""
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


# --- The natural gradient of a batch: F = N Σ v vᵀ, v by autograd


def assert_solves(model, preconditioner, loss, expected):
    """Assert that a step is the dense solve with the expected F of each layer."""
    for F, gradient, step in zip(expected, *layer_steps(model, preconditioner, loss), strict=True):
        assert_near(step, damped_solve(F, gradient, DAMPING), 1e-9)


@both_applications
@pytest.mark.parametrize("change", ["none", "penalty", "terms", "in chunks"])
def test_step_of_each_layer_is_the_dense_solve(change, application, monkeypatch):
    """For layers of every kind, whether the gradient is the product of the rows or not."""
    if change == "in chunks":
        monkeypatch.setattr("brandla.kfac.systems.samples._CHUNK_ENTRIES", 1)
    model, data = Words(7, 4, 3), words()
    expected, preconditioner = fishers(model, data), KFAC(model, Woodbury(), application=application, **DENSE)
    loss = loss_of(model, data, preconditioner if change == "terms" else None)
    penalty = sum(weight.square().sum() for weight in model.parameters()) / 10 if change == "penalty" else 0
    assert_solves(model, preconditioner, loss + penalty, expected)
    assert bool(preconditioner._layers[-1].gradient_is_pair) == (application == "auto" and change != "penalty")


def test_a_kept_batch_solves_for_later_gradients():
    """SENG's period: F is that of the first batch, and of the fourth after three steps."""
    layer = mlp(6, 4)[0]
    preconditioner = KFAC(layer, Woodbury(every=3), **DENSE)
    for step in range(5):
        data = batch(9, 6, 4, seed=step)
        if step % 3 == 0:
            expected = fishers(layer, data)
        assert_solves(layer, preconditioner, loss_of(layer, data), expected)


def test_a_sketch_of_samples_is_right_on_average_and_exact_with_all_features():
    torch.manual_seed(0)
    inputs, gradients = torch.randn(42, 5, dtype=torch.float64), torch.randn(42, 3, dtype=torch.float64)
    samples = Samples(inputs, gradients, positions=7, uses=42)
    assert samples.some_features(5, 0).inputs is inputs
    # γ has three entries, so three positions hold all of it.
    cut = samples.fewer_positions(3, 0)
    assert cut.positions == 3
    torch.testing.assert_close(cut.gram(), samples.gram())
    mean = sum(samples.some_features(3, seed).gram() for seed in range(1000)) / 1000
    # Relative to the largest entry, one draw deviates by about 1, and the mean by 1/√1000.
    assert_near(mean, samples.gram(), 0.12)


@both_applications
@pytest.mark.parametrize(
    ("make", "data"),
    [(partial(mlp, 6, 4), partial(batch, d_in=6, classes=4)), (partial(Words, 7, 4, 3), words)],
    ids=["linear", "every"],
)
def test_coefficients_stay_fixed_after_some_batches(make, data, application):
    """They belong to places in the order of ‖v‖, so a batch of half the size takes every other coefficient."""
    model = make()
    preconditioner = KFAC(model, Woodbury(fixed_after=3), application=application, **DENSE)
    kept = []
    for step, count in enumerate((8, 8, 8, 8, 4)):
        of_step = data(count, seed=step)
        samples = [v[v.norm(dim=1).argsort()] for v in gradients_by_sample(model, of_step)]
        if step < 3:
            ones = torch.ones(count, dtype=torch.float64)
            kept.append([damped_solve(count * v @ v.T, ones, DAMPING) for v in samples])
        _, steps = layer_steps(model, preconditioner, loss_of(model, of_step))
        if step >= 2:
            for result, v, *of_layer in zip(steps, samples, *kept, strict=True):
                assert_near(result.flatten(), (sum(of_layer) / 3)[:: 8 // count] @ v, 1e-9)


def test_a_sketched_step_never_goes_uphill():
    for seed in range(20):
        model = mlp(30, 40, 5, seed=seed)
        preconditioner = KFAC(model, Woodbury(features=1), application="two-sided", seed=seed, damping=1e-4, clip=None)
        found = layer_steps(model, preconditioner, loss_of(model, batch(16, 30, 5, seed)))
        for one, other in zip(*found, strict=True):
            assert (one * other).sum() >= -1e-9 * one.norm() * other.norm()


# --- Two levels, against the whole Fisher matrix

NOW = Now(0, 0, 0.95, Damping(DAMPING, "absolute"), torch.tensor(True))
DATA, small = batch(9, 12, 5), partial(mlp, 12, 14, 5)


def steps_of(make, data, inner, space, **options):
    """Return the two-level step, the inner system's step v₁, and its `dense_correction` as a function of F."""
    model, plain = make(), make()
    alone = KFAC(plain, inner, **options)
    _, step = layer_steps(model, KFAC(model, TwoLevel(inner, space), **options), loss_of(model, data))
    gradient, first = layer_steps(plain, alone, loss_of(plain, data))
    assert not alone.report().unsupported
    return flat(step), flat(first), partial(dense_correction, gradient, first, alone, space)


def dense_correction(gradient, first, preconditioner, space, F, damping=DAMPING, now=NOW):
    """Return v₁ + R₀ᵀ (R₀ F R₀ᵀ + λI)⁻¹ R₀ (∇ − (F + λI) v₁) with every matrix formed, and R₀."""
    sizes = [part.numel() for part in first]
    v, g = flat(first), flat(gradient)
    if space == "nicolaides":
        vectors = [torch.ones(size, dtype=F.dtype) for size in sizes]
    else:
        residual = (g - F @ v).split(sizes)
        vectors = [
            layer.curvature.solve(part.reshape(matrix.shape), now).reshape(-1)
            for layer, part, matrix in zip(preconditioner._layers, residual, first, strict=True)
        ]
    R = torch.block_diag(*[(vector / vector.norm())[None] for vector in vectors])
    return v + R.T @ damped_solve(R @ F @ R.T, R @ (g - F @ v - damping * v), damping), R


@both_applications
@both_spaces
@some_systems(
    *(EXACT, replace(EXACT, method="cholesky"), Brand(3), Brand(3, compress="cholesky"), Brand(3, form="eigh")),
    *(Foof(EXACT), ConjugateGradient()),
)
def test_step_is_the_formula_with_the_whole_fisher_matrix(strategy, space, application):
    result, first, correction = steps_of(small, DATA, strategy, space, application=application, **DENSE)
    # F + λI has a condition of about 1e2 on both levels.
    assert_near(result, correction(fisher(small(), DATA))[0], 1e-9)
    assert not torch.allclose(result, first, rtol=0.01)


@both_spaces
def test_relative_damping_goes_by_the_largest_eigenvalue_of_the_coarse_matrix(space):
    result, _, correction = steps_of(small, DATA, EXACT, space, damping=DAMPING, clip=None)
    F, now = fisher(small(), DATA), NOW._replace(damping=Damping(DAMPING, "relative"))
    _, R = correction(F, 1.0, now)
    shift = DAMPING * torch.linalg.eigvalsh(R @ F @ R.T)[-1].item()
    # Of two eigenvalues, four power iterations find the larger one up to (d₂/d₁)⁸.
    assert_near(result, correction(F, shift, now)[0], 1e-3)


def of_positions():
    torch.manual_seed(0)
    return pooled(nn.Linear(4, 6), width=6)


@pytest.mark.parametrize(("kind", "space"), [("linear", "nicolaides"), ("linear", "residual"), ("every", "nicolaides")])
def test_positions_are_summed_within_a_sample_and_blocks_have_the_scale_of_their_factors(kind, space):
    """Also in layers with indices, whole gradients and groups."""
    torch.manual_seed(1)
    labels = torch.randint(3, (8,))
    if kind == "linear":
        make, uses, inputs = of_positions, [8 * 5, 8], torch.randn(8, 5, 4, dtype=torch.float64)
    else:
        make, uses, inputs = (lambda: Words(9, 4, 3)), [8 * 5, 8, 8 * 4, 8], torch.randint(9, (8, 5))
    result, _, correction = steps_of(make, (inputs, labels), EXACT, space, **DENSE)
    assert_near(result, correction(fisher(make(), (inputs, labels), uses))[0], 1e-9)


def test_a_step_without_rows_is_the_inner_step():
    results = []
    for system in (TwoLevel(EXACT), EXACT):
        model = small()
        preconditioner = KFAC(model, system, factor_every=2)
        for _ in range(2):
            stepped(model, preconditioner, loss_of(model, DATA))
        results.append(gradients(model))
    torch.testing.assert_close(results[0], results[1])


def test_a_layer_with_another_number_of_samples_keeps_the_inner_step():
    results = []
    for system in (TwoLevel(EXACT), EXACT):
        model = mlp(6, 6, 6, 6)
        preconditioner = KFAC(model, system, clip=None)
        hidden = model[:3](torch.ones(8, 6, dtype=torch.float64))
        loss = hidden.sum() + model[4](hidden[:4].tanh()).square().sum()
        results.append(layer_steps(model, preconditioner, loss / 8)[1])
    assert [torch.allclose(one, other) for one, other in zip(*results, strict=True)] == [False, False, True]
