"""Options that change with the step, ranks that follow a tolerance or an error bound, damping that follows the loss."""

import pytest
import torch
from torch import nn

from brandla import Rank
from brandla.kfac import (
    KFAC,
    Adaptive,
    Brand,
    BrandCorrected,
    BrandRandomized,
    ErrorBound,
    Exact,
    Foof,
    InverseFree,
    Randomized,
)
from kfac.networks import EXACT, batch, layer_step, mlp, stepped, with_one
from kfac.systems import FORMS, factors_of, falling, growing, rule, seldom, some_systems


def steps_of(strategy, steps):
    layer = mlp(60, 50, bias=False)[0]
    preconditioner = KFAC(layer, strategy)
    for seed in range(steps):
        assert layer_step(layer, preconditioner, batch(8, 60, 50, seed)).result.isfinite().all()
        yield preconditioner


def ranks(preconditioner):
    return [row.rank for row in preconditioner.report().factors]


MAKERS = {
    **{name: lambda rank, form=form: Brand(rank, **form) for name, form in FORMS.items()},
    "brand-randomized": lambda rank: BrandRandomized(rank, overwrite_every=3),
    "brand-corrected": lambda rank: BrandCorrected(rank, correct_every=2),
    "randomized": lambda rank: Randomized(rank, inverse_every=1),
    "foof": lambda rank: Foof(Brand(rank)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("schedule", "expected"), [(growing, [4, 6, 8, 10, 12, 12]), (falling, [12, 12, 12, 5, 5, 5])], ids=["up", "down"]
)
def test_rank_is_that_of_the_step(make, schedule, expected):
    assert [set(ranks(own)) for own in steps_of(make(schedule), 6)] == [{rank} for rank in expected]


def test_a_rank_grows_no_faster_than_there_are_columns():
    found = [ranks(own)[0] for own in steps_of(Brand(lambda step: 2 if step == 0 else 40), 6)]
    assert found == [2, 10, 18, 26, 34, 40]


@pytest.mark.parametrize("options", [*FORMS.values(), {"rank": rule}], ids=[*FORMS, "schedule"])
def test_rank_rules_keep_values_above_their_tolerance(options):
    strategy = Brand(**({"rank": Rank(12, 1e-2)} | options))
    *_, preconditioner = steps_of(strategy, 5)
    for factor in factors_of(preconditioner):
        lowrank = factor.operand()
        # What the tolerance of compress="cholesky" is relative to is the diagonal of S.
        values = lowrank.eigenvalues if strategy.form == "eigh" else lowrank.gram.diagonal()
        assert lowrank.rank == 12
        assert (values[values > 0] > (1e-3 if strategy.rank is rule else 1e-2) * values.max()).all()


@some_systems(
    *(Exact(inverse_every=seldom), Exact(inverse_every=seldom, method="cholesky")),
    *(Randomized(6, inverse_every=seldom), BrandRandomized(6, overwrite_every=seldom)),
    *(BrandCorrected(6, correct_every=seldom), Brand(ErrorBound(0.1, 6, 8, every=seldom))),
    InverseFree(preconditioner_every=seldom),
)
def test_periods_are_those_of_the_step(strategy):
    seen = []
    for step, preconditioner in enumerate(steps_of(strategy, 9)):
        curvature = preconditioner._layers[0].curvature
        is_root = isinstance(strategy, InverseFree)
        if (curvature.renewed if is_root else curvature.input.state["renewed"]) == step:
            seen.append(step)
    assert seen == ([0, 1, 3, 6] if isinstance(strategy, Exact | Randomized) else [0, 1, 4, 7])


def test_schedules_are_named_by_their_functions_and_nothing_else():
    module = growing.__module__
    spelled = str(Foof(BrandRandomized(growing, overwrite_every=seldom)))
    assert spelled.startswith("Foof(inner=BrandRandomized(tail=0.0, rank=")
    assert f"rank={module}.growing, overwrite_every={module}.seldom, " in spelled
    bound = str(Brand(ErrorBound(0.1, 4, 8, seldom)))
    assert f"ErrorBound(target=0.1, least=4, most=8, every={module}.seldom)" in bound
    assert hash(Brand(growing)) == hash(Brand(growing))
    assert str(Brand(8)) == repr(Brand(8))


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_rank_grows_until_the_error_bound_is_met(options):
    """Columns of a slowly falling spectrum: rank 2 leaves far more than the target, and what is reached keeps to it."""
    layer = mlp(80, 3, bias=False)[0]
    spectrum = torch.arange(1.0, 81, dtype=torch.float64) ** -1.0
    target, path = 0.02, []
    preconditioner = KFAC(layer, Foof(Brand(ErrorBound(target, 2, 60, every=10), **options)), decay=0.8)
    for _ in range(100):
        inputs = torch.randn(12, 80, dtype=torch.float64) * spectrum
        stepped(layer, preconditioner, layer(inputs).square().mean())
        path.append(factors_of(preconditioner)[0].rank)
    (factor,) = factors_of(preconditioner)
    assert 8 <= path[-1] < 60
    assert factor.strategy.error_bound(factor.state) <= target * factor.largest()
    # Grows by half from reading to reading, from step 0 on, the rank of a step being that of the reading before it.
    assert [path[step] for step in (0, 1, 10, 11, 21)] == [2, 3, 3, 5, 8]


def test_rank_shrinks_where_the_data_has_less():
    layer = mlp(80, 3, bias=False)[0]
    basis, seen = torch.randn(3, 80, dtype=torch.float64), []
    preconditioner = KFAC(layer, Foof(Brand(ErrorBound(0.02, 3, 40, every=5))), decay=0.5)
    for step in range(130):
        rows = torch.randn(12, 80, dtype=torch.float64)
        stepped(layer, preconditioner, layer(rows if step < 40 else rows[:, :3] @ basis).square().mean())
        seen.append(factors_of(preconditioner)[0].rank)
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
        noise = 0.1 * torch.randn_like(inputs) * (inputs != 0)
        (gradient,) = stepped(conv, preconditioner, conv(inputs + noise).square().mean())
        assert gradient.isfinite().all()
        seen.append(factors_of(preconditioner)[0].rank)
    assert seen == [2, 3, 5, 8]


# --- Damping that follows the ratio of the loss's reduction to the predicted one


class Quadratic:
    """A linear model with the squared error, whose exact curvature is A ⊗ (2/C) I, and a step of it."""

    def __init__(self, damping, factor=1.0, **options):
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 10, dtype=torch.float64)
        self.inputs, self.targets = torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
        self.factor = factor
        self.preconditioner = KFAC(self.layer, EXACT, damping=damping, curvature="type-2", **{"clip": None} | options)

    def loss(self):
        return self.factor * nn.functional.mse_loss(self.layer(self.inputs), self.targets)

    def step(self, rate):
        self.layer.zero_grad()
        self.preconditioner.curvature(self.layer(self.inputs), loss="mse")
        loss = self.loss()
        loss.backward()
        self.preconditioner.step()
        torch.optim.SGD(self.layer.parameters(), rate).step()
        return self.preconditioner.adapt(loss, self.loss)


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("scale", ["relative", "absolute"])
@pytest.mark.parametrize("way", [{}, {"application": "two-sided"}, {"gradient": "pair"}], ids=str)
def test_the_ratio_of_a_quadratic_is_that_of_its_hessian_and_the_damped_one(way, scale, clip):
    task = Quadratic(Adaptive(0.2, every=1), damping_scale=scale, clip=clip, **way)
    inputs, parts = with_one(task.inputs), [task.layer.weight, task.layer.bias[:, None]]
    before = torch.cat(parts, 1).detach()
    gradient = 2 * (before @ inputs.T - task.targets.T) @ inputs / task.targets.numel()
    ratio = task.step(0.5)
    eye = [torch.eye(n, dtype=torch.float64) for n in (13, 10)]
    A, G = inputs.T @ inputs / 3, 2 / 10 * eye[1]
    shifts = [0.2 * (torch.linalg.eigvalsh(M)[-1] if scale == "relative" else 1) for M in (A, G)]
    change = torch.cat(parts, 1).detach() - before
    slope = (gradient * change).sum()
    exact = slope + (change * (G @ change @ A)).sum() / 2
    damped = slope + (change * ((G + shifts[1] * eye[1]) @ change @ (A + shifts[0] * eye[0]))).sum() / 2
    assert ratio == pytest.approx(float(exact / damped), rel=1e-9)
    assert ratio > 1


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.1 * 0.9**2), (4.0, 0.1 / 0.9**2)])
def test_damping_falls_where_the_model_is_right_and_rises_where_the_loss_is_steeper(factor, expected):
    """Every second step, and on from a checkpoint; its curvature knows nothing of a loss that is multiplied."""
    task = Quadratic(Adaptive(0.1, every=2, factor=0.9), factor)
    assert task.step(1.0) is not None
    assert task.preconditioner._adapted == pytest.approx(expected)
    assert task.step(1.0) is None
    resumed = Quadratic(Adaptive(0.1, every=2)).preconditioner
    resumed.load_state_dict(task.preconditioner.state_dict())
    assert resumed._adapted == task.preconditioner._adapted == pytest.approx(expected)


def test_bounds_hold_and_a_loss_that_is_not_finite_raises_the_damping():
    adaptive = Adaptive(0.1, every=1, factor=0.5, least=0.08, most=0.15)
    found = [adaptive.next(0.1, ratio) for ratio in (1.0, 0.5, 0.1, float("nan"), -float("inf"))]
    assert found == [0.08, 0.1, 0.15, 0.15, 0.15]


def test_a_look_that_comes_too_late_or_for_nothing_is_refused():
    task = Quadratic(Adaptive(0.1, every=1))
    task.preconditioner.curvature(task.layer(task.inputs), loss="mse")
    loss = task.loss()
    loss.backward()
    task.preconditioner.step()
    task.layer.zero_grad()
    with pytest.raises(
        RuntimeError, match=r"KFAC.adapt: \(model\).weight has no gradient; call adapt before zero_grad"
    ):
        task.preconditioner.adapt(loss, task.loss)
    with pytest.raises(RuntimeError, match=r"KFAC.adapt: damping must be Adaptive"):
        KFAC(nn.Linear(3, 3)).adapt(loss, task.loss)
