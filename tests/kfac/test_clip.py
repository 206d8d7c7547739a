"""The length of a step: clips, weights whose curvature is rounding, and cancellation."""

import math

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Brand, Exact, InverseFree, TwoLevel
from brandla.kfac.clip import rms_divisors, spectral_norms
from brandla.kfac.systems.two_level import _unit
from kfac.networks import average, batch, layer_gradient, loss_of, mlp, stepped
from kfac.systems import every_system, some_systems


def norm_of(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2))


def in_metric(preconditioner, steps):
    """Return √(sᵀ F s) over all layers, F block-diagonal with damped blocks."""
    squared = 0.0
    for index, step in enumerate(steps):
        sides = (average(preconditioner, side, index) for side in ("output", "input"))
        G, A = (M + 0.1 * torch.linalg.eigvalsh(M)[-1] * torch.eye(len(M), dtype=M.dtype) for M in sides)
        squared += float((step * (G @ step @ A)).sum())
    return [squared**0.5]


# The length that each clip bounds, the bound, and its relative error.
CLIPS = {
    "rms": (lambda _, steps: [float(step.square().mean().sqrt()) for step in steps], 1e-3, 1e-6),
    "kl": (in_metric, 1e-3**0.5, 1e-6),
    "spectral": (lambda _, steps: [norm_of(step) for step in steps], 0.05, 0.08),
}


@pytest.mark.parametrize("gradient", ["autograd", "pair"])
@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("clip_by", CLIPS)
def test_the_length_of_a_step_is_at_most_the_clip(clip_by, application, gradient):
    """A longer step is scaled to that length; a shorter step, also a step of 0, stays unchanged."""
    length, bound, error = CLIPS[clip_by]
    options = {"clip_by": clip_by, "application": application, "gradient": gradient, "damping": 0.1}
    found, lengths = [], []
    for clip in (None, bound**2 if clip_by == "kl" else bound, 1e9):
        model = mlp(10, 40, 40, 4)
        preconditioner = KFAC(model, Exact(inverse_every=1), clip=clip, **options)
        assert not any(part.any() for part in stepped(model, preconditioner, 0 * model(batch(8, 10, 4)[0]).sum()))
        for seed in (0, 1, 1):
            stepped(model, preconditioner, loss_of(model, batch(8, 10, 4, seed)))
        found.append([layer_gradient(layer) for layer in model[::2]])
        lengths.append(length(preconditioner, found[-1]))
    assert min(lengths[0]) > 1.2 * bound
    assert lengths[1] == pytest.approx([bound] * len(lengths[1]), rel=error)
    for free, clipped, loose in zip(*found, strict=True):
        assert torch.equal(free, loose)
        torch.testing.assert_close(clipped / clipped.norm(), free / free.norm())


def test_a_norm_is_found_even_if_the_old_direction_is_orthogonal():
    step = torch.diag(torch.tensor([0.0, 0.0, 3.0, 1.0]))
    orthogonal = torch.tensor([1.0, 0.0, 0.0, 0.0])
    for start in (None, orthogonal):
        (found,) = spectral_norms([step], [start], seed=3)
        assert found.norm == pytest.approx(3, rel=1e-2)
        torch.testing.assert_close(found.direction.abs(), torch.eye(4)[2], rtol=0, atol=0.1)
    (pair,) = spectral_norms([(step, torch.eye(4))], [found.direction], seed=3)
    torch.testing.assert_close(pair.norm, torch.tensor(3.0))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_step_without_a_norm_leaves_the_direction_unchanged(bad):
    before = torch.tensor([0.6, 0.8])
    (found,) = spectral_norms([torch.full((3, 2), bad)], [before], seed=0)
    assert torch.equal(found.direction, before)


def test_scales_are_clipped_as_a_diagonal_matrix_and_each_projection_separately():
    torch.manual_seed(0)
    model = nn.ModuleDict({"norm": nn.LayerNorm(12), "attention": nn.MultiheadAttention(12, 2)})
    preconditioner = KFAC(model, Exact(inverse_every=1), clip=0.05, clip_by="spectral")
    for _ in range(2):
        inputs = model["norm"](torch.randn(5, 6, 12))
        stepped(model, preconditioner, model["attention"](inputs, inputs, inputs)[0].square().mean())
    norm, attention = model["norm"], model["attention"]
    channels = torch.stack([norm.weight.grad, norm.bias.grad]).norm(dim=0)
    assert channels.max() == pytest.approx(0.05, rel=1e-3)
    parts = torch.cat([attention.in_proj_weight.grad, attention.in_proj_bias.grad[:, None]], dim=1).chunk(3)
    assert [norm_of(part) for part in parts] == pytest.approx([0.05] * 3, rel=0.08)


def attention_steps(strategy, steps=4, **options):
    """Return steps and gradients of the projections of queries, keys and values, for a mean over positions."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)])
    preconditioner = KFAC(model, strategy, sharing="reduce", **options)
    for _ in range(steps):
        inputs = torch.randn(8, 6, 16)
        model.zero_grad()
        outputs = model[1](model[0](inputs, inputs, inputs)[0].mean(1))
        if "curvature" in options:
            preconditioner.curvature(outputs)
        nn.functional.cross_entropy(outputs, torch.arange(8) % 4).backward()
        gradient = model[0].in_proj_weight.grad.clone()
        preconditioner.step()
    return list(model[0].in_proj_weight.grad.chunk(3)), list(gradient.chunk(3))


@pytest.mark.parametrize("curvature", ["empirical", "monte-carlo"])
@every_system
def test_keys_whose_summed_gradients_are_rounding_take_no_huge_step(strategy, curvature):
    """Softmax ignores a vector added to all keys: the sum of their gradients is 0, but each gradient is not."""
    steps, gradients = attention_steps(strategy, clip=None, curvature=curvature)
    lengths = [float(part.norm()) for part in steps]
    assert lengths[1] < 50 * max(lengths[0], lengths[2])
    in_metric = [float((step * gradient).sum().abs()) for step, gradient in zip(steps, gradients, strict=True)]
    assert max(in_metric) < 16.5 / (1 - 0.95)


@pytest.mark.parametrize(("clip_by", "clip"), [("rms", 0.07), ("kl", 0.01), ("spectral", 0.3)])
@some_systems("exact", "brand", "ekfac", "singd", "two-level")
def test_all_projections_of_an_attention_keep_moving(strategy, clip_by, clip):
    steps, _ = attention_steps(strategy, clip=clip, clip_by=clip_by)
    lengths = [float(part.norm()) for part in steps]
    assert max(lengths) < 100 * min(lengths)


def test_a_channel_whose_curvature_is_rounding_does_not_outweigh_the_others():
    """With the gradient ε and the block ε², the step would be 1/ε."""
    norm = nn.LayerNorm(4)
    preconditioner = KFAC(norm, Exact(), clip=None)
    scales = torch.tensor([1.0, 1.0, 1.0, 1e-9])
    stepped(norm, preconditioner, (norm(torch.randn(6, 4)) * scales).sum() / 6)
    step = norm.bias.grad
    assert step[3].abs() < step[:3].abs().max()


def test_a_step_of_infinite_length_has_an_infinite_divisor():
    assert rms_divisors([[torch.full((2,), math.inf)]], 0.07)[0] == math.inf


def cancelling(seed, rest):
    """Return a pair of twice 16 columns whose product P Qᵀ is ``rest`` times as large as its terms."""
    generator = torch.Generator().manual_seed(seed)
    first, second, error = (torch.randn(n, 16, generator=generator) for n in (60, 80, 80))
    return torch.cat([first, first], dim=1), torch.cat([second, rest * error - second], dim=1)


@pytest.mark.parametrize(("rest", "clip_by"), [(0.0, "rms"), (1e-6, "rms"), (1e-4, "rms"), (1e-6, "kl")])
def test_a_step_that_cancels_is_clipped_too(rest, clip_by):
    """The entries give its length: Gram matrices of the pair would give only rounding, of either sign.

    Inputs appear twice, with opposite gradients up to ``rest``. λ is so small that the rest of the sum is longer than
    the bound.
    """
    for seed in range(5):
        first, second = cancelling(seed, rest)
        model = mlp(60, 80, bias=False, seed=seed, dtype=torch.float32)[0]
        preconditioner = KFAC(model, Brand(16), damping=1e-7, clip=0.07, clip_by=clip_by)
        # The loss is linear in the outputs, so the output gradients are its coefficients.
        (step,) = stepped(model, preconditioner, (model(first.mT) * second.mT).sum())
        assert step.isfinite().all()
        # A sum of 4800 squares: a relative error of a few ε.
        most = 0.07 * (1 + 1e3 * torch.finfo(torch.float32).eps) if clip_by == "rms" else math.inf
        assert step.double().square().mean().sqrt() <= most


def test_unit_vectors_of_the_coarse_space_are_finite_where_pairs_cancel():
    for seed in range(20):
        first, second = _unit(cancelling(seed, 1e-5))
        assert first.isfinite().all()
        # The length is at most 1, however small the product is.
        assert norm_of(first.double() @ second.double().mT) <= 1


@some_systems(Brand(16), Exact(), InverseFree(), TwoLevel(Brand(16)), TwoLevel(Exact(), space="residual"))
def test_weights_stay_finite_where_gradients_of_samples_cancel(strategy):
    """Every input appears twice, with targets on either side: at the optimum the gradient is 0, but not its terms."""
    torch.manual_seed(0)
    inputs, targets, errors = torch.randn(8, 100), torch.randn(8, 60), torch.randn(8, 60)
    inputs, targets = torch.cat([inputs, inputs]), torch.cat([targets + errors, targets - errors])
    model = nn.Linear(100, 60)
    preconditioner = KFAC(model, strategy, damping=1.0)
    for _ in range(80):
        stepped(model, preconditioner, (model(inputs) - targets).square().mean())
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert all(part.isfinite().all() for part in model.parameters())
