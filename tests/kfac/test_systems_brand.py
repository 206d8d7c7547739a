"""The forms of Brand beside each other, and the mean tail of every strategy against the dense formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla import LowRankEigh
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Foof, Randomized, Strategy
from brandla.kfac.systems.kronecker import FactorStrategy
from brandla.kfac.values import Damping
from kfac.networks import batch, layer_gradient

DAMPING = 0.03
FORMS = {"root": Brand(16), "cholesky": Brand(16, compress="cholesky"), "eigh": Brand(16, form="eigh")}


def trained(strategy: Strategy, dtype: torch.dtype, steps: int, **options: object) -> tuple[KFAC, nn.Linear]:
    """A layer whose inputs have a spectrum that falls by i⁻¹, after some steps."""
    torch.manual_seed(0)
    layer = nn.Linear(60, 50, bias=False, dtype=dtype)
    preconditioner = KFAC(layer, strategy, damping=DAMPING, clip=None, **options)
    for seed in range(steps):
        inputs, labels = batch(8, 60, 50, seed, dtype)
        layer.zero_grad()
        nn.functional.cross_entropy(layer(inputs * spectrum(dtype)), labels).backward()
        preconditioner.step()
    return preconditioner, layer


def spectrum(dtype: torch.dtype) -> Tensor:
    return torch.arange(1, 61, dtype=dtype) ** -1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_root_and_eigh_give_the_same_step(dtype: torch.dtype):
    """To ε d₁/(λ (1 − ρ)) of either form, where the spectrum falls.

    A flat one, such as that of the output gradients here, has no gap where it is cut: which of two directions is kept
    is then left to rounding.
    """
    steps = [
        layer_gradient(trained(Foof(strategy), dtype, 60)[1]).double() for strategy in (FORMS["root"], FORMS["eigh"])
    ]
    difference = torch.linalg.matrix_norm(steps[0] - steps[1]) / torch.linalg.matrix_norm(steps[1])
    assert difference <= 2 * torch.finfo(dtype).eps / (DAMPING * 0.05)


STRATEGIES = {
    "exact": Exact(inverse_every=1, tail="mean"),
    "randomized": Randomized(16, inverse_every=1, tail="mean"),
    "root": Brand(16, tail="mean"),
    "cholesky": Brand(16, compress="cholesky", tail="mean"),
    "eigh": Brand(16, form="eigh", tail="mean"),
    "brand-randomized": BrandRandomized(16, overwrite_every=3, tail="mean"),
    "brand-corrected": BrandCorrected(16, correct_every=2, tail="mean"),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_mean_tail_is_the_mean_of_what_is_left_out(strategy: FactorStrategy):
    """τ = (tr M − tr M̂)/(n − r), against inverses of the dense average; in a root every value under τ counts as τ."""
    preconditioner, layer = trained(Foof(strategy), torch.float64, 6, damping_scale="absolute")
    (factor,) = (factor for _, factor in preconditioner._layers[0].curvature.factors())
    dense = torch.zeros(60, 60, dtype=torch.float64)
    for seed in range(6):
        inputs = batch(8, 60, 50, seed)[0] * spectrum(torch.float64)
        dense = 0.95 * dense + 0.05 * inputs.T @ inputs / 8
    dense /= 1 - 0.95**6
    kept = strategy.lowrank(factor.state)
    values, vectors = torch.linalg.eigh(kept.dense())
    values, vectors = values.flip(0)[: kept.rank], vectors.flip(1)[:, : kept.rank]
    tail = (dense.trace() - values.sum()) / max(60 - kept.rank, 1)
    held = values if isinstance(kept, LowRankEigh) else values.clamp_min(tail)
    eye = torch.eye(60, dtype=torch.float64)
    damped = (vectors * held) @ vectors.T + tail * (eye - vectors @ vectors.T) + DAMPING * eye
    inputs, labels = batch(8, 60, 50, 9)
    layer.zero_grad()
    nn.functional.cross_entropy(layer(inputs), labels).backward()
    gradient = layer_gradient(layer)
    found = factor.damped_solve(gradient.T, Damping(DAMPING, "absolute"))
    assert kept.rank == 60 or tail > 1e-4 * DAMPING
    torch.testing.assert_close(found, torch.linalg.solve(damped, gradient.T))


@pytest.mark.filterwarnings("ignore:KFAC. a batch was skipped")
@pytest.mark.parametrize("strategy", FORMS.values(), ids=FORMS)
def test_a_batch_that_is_not_finite_leaves_the_factor_as_it_was(strategy: Brand):
    preconditioner, layer = trained(strategy, torch.float32, 3)
    factors = [factor for _, factor in preconditioner._layers[0].curvature.factors()]
    before = [(strategy.lowrank(factor.state).dense(), factor.state["trace"]) for factor in factors]
    layer.zero_grad()
    layer(torch.full((4, 60), float("inf"))).sum().backward()
    preconditioner.step()
    for factor, (dense, trace) in zip(factors, before, strict=True):
        # Columns turned by an orthogonal matrix, or columns polished once more: a few ε of the largest entry.
        bound = 16 * torch.finfo(torch.float32).eps * float(dense.abs().max())
        torch.testing.assert_close(strategy.lowrank(factor.state).dense(), dense, rtol=0, atol=bound)
        assert torch.equal(factor.state["trace"], trace)
