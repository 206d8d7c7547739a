"""Options that change with the step, ranks that follow a tolerance or the error bound."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brandla import Rank
from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, ErrorBound, Exact, Foof, Randomized, Strategy
from kfac.networks import batch, loss_of, stepped


def growing(step: int) -> int:
    """4, 6, 8, ... 12."""
    return min(4 + 2 * step, 12)


def falling(step: int) -> int:
    """12 for three steps, then 5."""
    return 12 if step < 3 else 5


def rule(step: int) -> Rank:
    """A rule that grows."""
    return Rank(growing(step), 1e-3)


def seldom(step: int) -> int:
    """1 for two steps, then every three."""
    return 1 if step < 2 else 3


def layer_and(strategy: Strategy, **options: object) -> tuple[nn.Linear, KFAC]:
    torch.manual_seed(0)
    layer = nn.Linear(60, 50, bias=False, dtype=torch.float64)
    return layer, KFAC(layer, strategy, **options)


def train(layer: nn.Linear, preconditioner: KFAC, seeds: range) -> None:
    for seed in seeds:
        stepped(layer, preconditioner, loss_of(layer, batch(8, 60, 50, seed)))


def ranks(preconditioner: KFAC) -> list[int | None]:
    return [row.rank for row in preconditioner.report().factors]


@pytest.mark.parametrize(
    "make",
    [
        Brand,
        lambda rank: Brand(rank, compress="cholesky"),
        lambda rank: Brand(rank, form="eigh"),
        lambda rank: BrandRandomized(rank, overwrite_every=3),
        lambda rank: BrandCorrected(rank, correct_every=2),
        lambda rank: Randomized(rank, inverse_every=1),
        lambda rank: Foof(Brand(rank)),
    ],
    ids=["brand", "brand-cholesky", "brand-eigh", "brand-randomized", "brand-corrected", "randomized", "foof"],
)
@pytest.mark.parametrize(
    ("schedule", "expected"), [(growing, [4, 6, 8, 10, 12, 12]), (falling, [12, 12, 12, 5, 5, 5])], ids=["up", "down"]
)
def test_rank_is_that_of_the_step(make: object, schedule: object, expected: list[int]):
    layer, preconditioner = layer_and(make(schedule))
    seen = []
    for seed in range(6):
        train(layer, preconditioner, range(seed, seed + 1))
        seen.append(set(ranks(preconditioner)))
        assert torch.isfinite(layer.weight.grad).all()
    assert seen == [{rank} for rank in expected]


def test_a_rank_grows_no_faster_than_there_are_columns():
    layer, preconditioner = layer_and(Brand(lambda step: 2 if step == 0 else 40))
    seen = []
    for seed in range(6):
        train(layer, preconditioner, range(seed, seed + 1))
        seen.append(ranks(preconditioner)[0])
    assert seen == [2, 10, 18, 26, 34, 40]


@pytest.mark.parametrize(
    "strategy",
    [
        Brand(Rank(12, 1e-2)),
        Brand(Rank(12, 1e-2), form="eigh"),
        Brand(Rank(12, 1e-2), compress="cholesky"),
        Brand(rule),
    ],
)
def test_rank_rules_keep_values_above_their_tolerance(strategy: Brand):
    layer, preconditioner = layer_and(strategy)
    train(layer, preconditioner, range(5))
    for _, factor in preconditioner._layers[0].curvature.factors():
        lowrank = factor.operand()
        # What the tolerance of compress="cholesky" is relative to is the diagonal of S.
        values = lowrank.eigenvalues if strategy.form == "eigh" else lowrank.gram.diagonal()
        tol = 1e-3 if strategy.rank is rule else 1e-2
        kept = values[values > 0]
        assert lowrank.rank == 12
        assert (kept > tol * values.max()).all()


@pytest.mark.parametrize(
    "strategy",
    [
        Exact(inverse_every=seldom),
        Exact(inverse_every=seldom, method="cholesky"),
        Randomized(6, inverse_every=seldom),
        BrandRandomized(6, overwrite_every=seldom),
        BrandCorrected(6, correct_every=seldom),
        Brand(ErrorBound(0.1, 6, 8, every=seldom)),
    ],
    ids=["exact", "cholesky", "randomized", "brand-randomized", "brand-corrected", "error-bound"],
)
def test_periods_are_those_of_the_step(strategy: Strategy):
    layer, preconditioner = layer_and(strategy)
    seen = []
    for seed in range(9):
        train(layer, preconditioner, range(seed, seed + 1))
        (_, factor), _ = preconditioner._layers[0].curvature.factors()
        if factor.state["renewed"] == seed:
            seen.append(seed)
    assert seen == ([0, 1, 3, 6] if isinstance(strategy, Exact | Randomized) else [0, 1, 4, 7])


def test_schedules_are_named_by_their_functions_and_nothing_else():
    module = growing.__module__
    spelled = str(Foof(BrandRandomized(growing, overwrite_every=seldom)))
    assert spelled.startswith("Foof(inner=BrandRandomized(tail=0.0, rank=")
    assert f"rank={module}.growing, overwrite_every={module}.seldom, " in spelled
    assert f"ErrorBound(target=0.1, least=4, most=8, every={module}.seldom)" in str(
        Brand(ErrorBound(0.1, 4, 8, seldom))
    )
    assert hash(Brand(growing)) == hash(Brand(growing))
    assert str(Brand(8)) == repr(Brand(8))


FORMS = {"root": {}, "cholesky": {"compress": "cholesky"}, "eigh": {"form": "eigh"}}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_rank_grows_until_the_error_bound_is_met(options: dict[str, str]):
    """Columns of a slowly falling spectrum: rank 2 leaves far more than the target, and what is reached keeps to it."""
    torch.manual_seed(0)
    layer = nn.Linear(80, 3, bias=False, dtype=torch.float64)
    spectrum = torch.arange(1.0, 81, dtype=torch.float64) ** -1.0
    target, path = 0.02, []
    preconditioner = KFAC(layer, Foof(Brand(ErrorBound(target, 2, 60, every=10), **options)), decay=0.8)
    for _ in range(150):
        layer.zero_grad()
        layer(torch.randn(12, 80, dtype=torch.float64) * spectrum).square().mean().backward()
        preconditioner.step()
        path.append(preconditioner.report().factors[0])
    (factor,) = [factor for _, factor in preconditioner._layers[0].curvature.factors()]
    error = factor.strategy.error_bound(factor.state) / factor.largest()
    assert path[0].rank == 2
    assert 8 <= path[-1].rank < 60
    assert error <= target
    # Grows by half from reading to reading, from step 0 on, the rank of a step being that of the reading before it.
    assert [path[step].rank for step in (0, 1, 10, 11, 21)] == [2, 3, 3, 5, 8]


def test_rank_shrinks_where_the_data_has_less():
    torch.manual_seed(0)
    layer = nn.Linear(80, 3, bias=False, dtype=torch.float64)
    basis = torch.randn(3, 80, dtype=torch.float64)
    bound = ErrorBound(0.02, 3, 40, every=5)
    preconditioner = KFAC(layer, Foof(Brand(bound)), decay=0.5)
    wide, narrow = (
        (lambda: torch.randn(12, 80, dtype=torch.float64)),
        (lambda: torch.randn(12, 3, dtype=torch.float64) @ basis),
    )
    seen = []
    for data in [wide] * 40 + [narrow] * 90:
        layer.zero_grad()
        layer(data()).square().mean().backward()
        preconditioner.step()
        seen.append(preconditioner.report().factors[0].rank)
    assert max(seen) == 40
    assert seen[-1] == 3


def test_a_batch_of_factors_has_one_rank_and_goes_by_its_worst():
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 6, 3, groups=2, bias=False)
    preconditioner = KFAC(conv, Foof(Brand(ErrorBound(0.01, 2, 30, every=1))), sharing="reduce")
    inputs = torch.randn(5, 24, 6, 6)
    inputs[:, :12] *= 0.0
    seen = []
    for _ in range(4):
        conv.zero_grad()
        conv(inputs + 0.1 * torch.randn_like(inputs) * (inputs != 0)).square().mean().backward()
        preconditioner.step()
        seen.append(ranks(preconditioner)[0])
    assert seen == [2, 3, 5, 8]
    assert torch.isfinite(conv.weight.grad).all()
