"""The step of a Linear against dense formulas, by every strategy of factors."""

from __future__ import annotations

import pytest
import torch

from brandla.kfac import KFAC, Foof, Strategy
from brandla.kfac.systems.kronecker import FactorStrategy
from kfac.networks import batch, damped_inverse, layer_step, mlp
from kfac.systems import assert_near, full_rank

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")

DAMPING = 0.03
FULL_RANK = full_rank(24)


def estimates(strategy: Strategy) -> bool:
    """Whether d₁ is estimated, from below, and with it the damping."""
    return "cholesky" in (getattr(strategy, "compress", ""), getattr(strategy, "method", ""))


@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize("foof", [False, True], ids=["both", "foof"])
@pytest.mark.parametrize("strategy", FULL_RANK.values(), ids=FULL_RANK)
def test_one_batch_equals_the_dense_formula(strategy: FactorStrategy, application: str, foof: bool):
    """(G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹; FOOF leaves out the first."""
    layer = mlp(60, 50)[0]
    system = Foof(strategy) if foof else strategy
    preconditioner = KFAC(layer, system, damping=DAMPING, clip=None, application=application)
    step = layer_step(layer, preconditioner, batch(8, 60, 50))
    averages = dict(zip(("input", "output"), step.factors, strict=True))
    inverses = {}
    for side, factor in preconditioner._layers[0].curvature.factors():
        true, found = torch.linalg.eigvalsh(averages[side])[-1], factor.largest()
        assert (0.8 if estimates(strategy) else 1 - 1e-12) <= found / true <= 1 + 1e-12
        inverses[side] = damped_inverse(averages[side], DAMPING, found)
    left = torch.eye(50, dtype=torch.float64) if foof else inverses["output"]
    assert_near(step.result, left @ step.gradient @ inverses["input"], 1e-9)


@pytest.mark.parametrize("name", [name for name in FULL_RANK if name.startswith("brand")])
def test_brand_equals_exact_while_its_rank_holds_all_data(name: str):
    """Three batches of 8 have rank 24: nothing is truncated."""
    steps = []
    for strategy in (FULL_RANK["exact"], FULL_RANK[name]):
        layer = mlp(60, 50)[0]
        preconditioner = KFAC(layer, strategy, damping=DAMPING, clip=None)
        for seed in range(3):
            step = layer_step(layer, preconditioner, batch(8, 60, 50, seed))
        steps.append(step.result)
    assert_near(steps[1], steps[0], 2e-2 if estimates(strategy) else 1e-8)
