"""Options: bad values, schedules, ranks that follow a tolerance or a bound, and damping that follows the loss."""

import re

import pytest
import torch
from torch import nn

from brandla import Rank
from brandla.kfac import (
    EKFAC,
    KBFGS,
    KFAC,
    PINN,
    Adaptive,
    Brand,
    BrandCorrected,
    BrandRandomized,
    ConjugateGradient,
    ErrorBound,
    Exact,
    Foof,
    InverseFree,
    Randomized,
    TwoLevel,
    Woodbury,
    forward_laplacian,
    register,
)
from brandla.kfac.systems.structures import BlockDiagonal, Hierarchical
from kfac.networks import EXACT, OwnLinear, batch, layer_step, mlp, stepped, with_one
from kfac.systems import FORMS, factors_of, falling, growing, rule, seldom, some_systems

# --- Bad values and types

MODEL = mlp(10, 20, 4)
TANH = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
TWICE = nn.ModuleDict(dict.fromkeys("ab", MODEL[0]))
# Values of the right type that are out of range; … matches any text.
VALUES = [
    (lambda: KFAC(MODEL, damping=0.0), "KFAC: damping must be finite and > 0; got 0.0"),
    (lambda: [*steps_of(Exact(), 1, damping=lambda step: 1.0 - step)], "KFAC: damping must be finite and > 0; got 0.0"),
    (lambda: KFAC(MODEL, clip=0.0), "clip must be finite and > 0, or None; got 0.0"),
    (lambda: KFAC(MODEL, decay=1.0), "decay must be in [0, 1); got 1.0"),
    (lambda: KFAC(MODEL, factor_every=0), "factor_every must be at least 1; got 0"),
    (lambda: KFAC(MODEL, sharing="share"), "sharing must be 'expand' or 'reduce'; got 'share'"),
    (lambda: KFAC(MODEL, sharing=lambda name, module: None), "sharing must be 'expand' or 'reduce'; got None"),
    (lambda: KFAC(MODEL, sharing={"nowhere": "reduce"}), "it has no module 'nowhere'"),
    (lambda: KFAC(MODEL, damping_scale="log"), "damping_scale must be 'relative' or 'absolute'; got 'log'"),
    (lambda: KFAC(MODEL, application="linear"), "application must be 'auto' or 'two-sided'; got 'linear'"),
    (lambda: KFAC(MODEL, curvature="exact"), "curvature must be 'empirical' or 'monte-carlo' or 'type-2'; got 'exact'"),
    (lambda: KFAC(MODEL, gradient="none"), "KFAC: gradient must be 'autograd' or 'pair'; got 'none'"),
    (lambda: KFAC(MODEL, distributed="ring"), "distributed must be 'gather' or 'split'"),
    (lambda: KFAC(MODEL, columns=0), "columns must be"),
    (lambda: KFAC(MODEL, batch_first="time"), "batch_first must be True, False or None; got 'time'"),
    (lambda: KFAC(mlp(3, 3)).mask(torch.ones(3)), "KFAC.mask: valid must be a tensor (samples, positions)"),
    (lambda: KFAC(mlp(3, 3)).graphs(torch.rand(2, 2)).__enter__(), "KFAC.graphs: index …; got float32 of shape (2, 2)"),
    (lambda: register(OwnLinear, like="scale"), "like, for OwnLinear, must be 'linear' or 'transposed'; got 'scale'"),
    (lambda: register(nn.GRU, like="linear"), "register: like, for GRU, must be "),
    (lambda: Brand(0), "Brand: rank must be at least 1; got 0"),
    (lambda: Brand(lambda step: 0), "Brand: rank must be at least 1; got 0"),
    (lambda: Brand(4, form="sym"), "Brand: form must be 'root' or 'eigh'; got 'sym'"),
    (lambda: Brand(4, compress="qr"), "Brand: compress must be 'auto' or 'eigh' or 'cholesky'; got 'qr'"),
    (lambda: Brand(4, form="eigh", compress="cholesky"), "Brand: compress must be 'eigh' or 'auto' for form='eigh'"),
    (lambda: Brand(4, tail="largest"), "Brand: tail must be a number >= 0, 'mean' or 'smallest'; got 'largest'"),
    (lambda: Brand(8, sketch=0), "Brand: sketch must be at least 1; got 0"),
    (lambda: ErrorBound(0.0, 1, 2), "ErrorBound: target must be finite and > 0; got 0.0"),
    (lambda: ErrorBound(0.1, 0, 2), "ErrorBound: least must be at least 1; got 0"),
    (lambda: ErrorBound(0.1, 4, 2), "ErrorBound: most must be at least 4; got 2"),
    (lambda: ErrorBound(0.1, 1, 2, every=0), "ErrorBound: every must be at least 1; got 0"),
    (lambda: Exact(inverse_every=0), "Exact: inverse_every must be at least 1; got 0"),
    (lambda: Exact(inverse_every=lambda step: 0), "Exact: inverse_every must be at least 1; got 0"),
    (lambda: Exact(method="qr"), "Exact: method must be 'eigh' or 'cholesky'; got 'qr'"),
    (lambda: Exact(method="cholesky", tail="smallest"), "Exact: tail must be 0 for method='cholesky'"),
    (lambda: Exact(method="cholesky", tail=0.1), "leaves no eigenvalue out; got 0.1"),
    (lambda: Randomized(4, method="qr"), "Randomized: method must be 'svd' or 'eigh'; got 'qr'"),
    (lambda: Randomized(4, oversample=-1), "Randomized: oversample must be at least 0; got -1"),
    (lambda: BrandRandomized(4, overwrite_every=0), "BrandRandomized: overwrite_every must be at least 1"),
    (lambda: BrandCorrected(4, fraction=0.0), "BrandCorrected: fraction must be in (0, 1]; got 0.0"),
    (lambda: ConjugateGradient(iterations=0), "ConjugateGradient: iterations must be at least 1; got 0"),
    (lambda: ConjugateGradient(batches=0), "ConjugateGradient: batches must be at least 1; got 0"),
    (lambda: InverseFree("banded"), "InverseFree: structure must be one of 'dense', 'diagonal'"),
    (lambda: InverseFree(variant="kfac"), "variant must be 'singd' or 'ikfac'; got 'kfac'"),
    (lambda: InverseFree(rate=0.0), "rate must be finite and > 0; got 0.0"),
    (lambda: InverseFree(momentum=1.0), "momentum must be in [0, 1); got 1.0"),
    (lambda: InverseFree(preconditioner_every=0), "preconditioner_every must be at least 1"),
    (lambda: KBFGS(average=1.0), "KBFGS: average must be in [0, 1); got 1.0"),
    (lambda: KBFGS(curved=0.0), "KBFGS: curved must be in (0, 1); got 0.0"),
    (lambda: Woodbury(every=0), "Woodbury: every must be at least 1; got 0"),
    (lambda: Woodbury(features=0), "Woodbury: features must be at least 1; got 0"),
    (lambda: TwoLevel(Exact(), "krylov"), "TwoLevel: space must be 'nicolaides' or 'residual'; got 'krylov'"),
    (lambda: BlockDiagonal(0), "BlockDiagonal: block must be at least 1"),
    (lambda: Hierarchical(-1), "Hierarchical: first must be at least 0"),
    (lambda: Hierarchical(1, -2), "Hierarchical: last must be at least 0"),
    (lambda: Adaptive(every=0), "Adaptive: every must be at least 1; got 0"),
    (lambda: Adaptive(factor=1.0), "Adaptive: factor must be in (0, 1); got 1.0"),
    (lambda: Adaptive(0.0), "Adaptive: 0 < least <= initial <= most < inf must hold; got 1e-08, 0.0 and"),
    (lambda: KFAC(nn.DataParallel(mlp(10, 20, 4))), "KFAC: the model must not be in nn.DataParallel; use"),
    (lambda: KFAC(TWICE, {"b": Exact()}), "inverse must name modules of the model; 'b' is 'a': use this name"),
    (lambda: KFAC(nn.Sequential(nn.PReLU())), "the model must have an nn.Linear… PReLU, Sequential; register"),
    (lambda: PINN(TANH, damping=0), "PINN: damping must be finite and > 0; got 0"),
]
TYPES = [
    (lambda: KFAC(MODEL, factor_every=1.5), "factor_every must be an int; got float 1.5"),
    (lambda: KFAC(MODEL, inverse="brand"), "inverse must be a strategy such as Brand(rank=128), or None; got str"),
    (lambda: KFAC(MODEL, inverse=lambda name, module: "brand"), "inverse must be a strategy"),
    (lambda: KFAC(MODEL, Brand), "Brand(rank=128), or None; got the class Brand; construct it"),
    (lambda: register(nn.Linear(2, 2), like="linear"), "register: module must be a type of modules, such as MyLinear"),
    (lambda: Brand(2.5), "Brand: rank must be an int; got float 2.5"),
    (lambda: BrandRandomized(ErrorBound(0.1, 1, 2)), "BrandRandomized: rank must be an int"),
    (lambda: Randomized(Rank(4, 0.1)), "Randomized: rank must be an int; got Rank"),
    (lambda: InverseFree(3), "InverseFree: structure must be a name or a Structure; got int"),
    (lambda: TwoLevel("exact"), "TwoLevel: inner must be a strategy such as Brand(rank=128); got str"),
    (lambda: Foof(Exact), "Foof: inner must be a strategy of factors such as Brand(rank=128); got Exact"),
    (lambda: Foof(EKFAC()), "got EKFAC"),
    (lambda: KFAC(MODEL.parameters()), "KFAC: model must be an nn.Module; got generator; pass the model itself"),
    (lambda: PINN(MODEL), "PINN: model must be nn.Sequential of nn.Linear and Tanh, …; it has ReLU"),
    (lambda: PINN(TANH, EKFAC()), "PINN: inverse must be None or a strategy of factors …; got EKFAC"),
    (lambda: forward_laplacian(MODEL[0], torch.ones(3, 10)), "forward_laplacian: model must be nn.Sequential "),
]


@pytest.mark.parametrize(
    ("make", "message", "error"), [*((*case, ValueError) for case in VALUES), *((*case, TypeError) for case in TYPES)]
)
def test_bad_values_and_types_are_refused(make, message, error):
    with pytest.raises(error, match=re.escape(message).replace("…", ".*")):
        make()


# --- Schedules, and ranks that follow a tolerance or an error bound


def steps_of(strategy, steps, **options):
    layer = mlp(60, 50, bias=False)[0]
    preconditioner = KFAC(layer, strategy, **options)
    for seed in range(steps):
        assert layer_step(layer, preconditioner, batch(8, 60, 50, seed)).result.isfinite().all()
        yield preconditioner


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
    found = [{row.rank for row in own.report().factors} for own in steps_of(make(schedule), 6)]
    assert found == [{rank} for rank in expected]


def test_a_rank_grows_no_faster_than_there_are_columns():
    found = [own.report().factors[0].rank for own in steps_of(Brand(lambda step: 2 if step == 0 else 40), 6)]
    assert found == [2, 10, 18, 26, 34, 40]


@pytest.mark.parametrize("options", [*FORMS.values(), {"rank": rule}], ids=[*FORMS, "schedule"])
def test_rank_rules_keep_values_above_their_tolerance(options):
    strategy = Brand(**({"rank": Rank(12, 1e-2)} | options))
    *_, preconditioner = steps_of(strategy, 5)
    for factor in factors_of(preconditioner):
        lowrank = factor.operand()
        # With compress="cholesky", the tolerance is relative to the diagonal of S.
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


@pytest.mark.parametrize("seed", [10**9, 2**62])
def test_large_seeds_draw_like_others(seed):
    layer = mlp(20, 15)[0]
    system = Randomized(2, inverse_every=1)
    preconditioner = KFAC(layer, system, clip_by="spectral", clip=0.3, seed=seed)
    assert layer_step(layer, preconditioner, batch(8, 20, 15)).result.isfinite().all()


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
    """For a slowly falling spectrum, rank 2 misses the target by far; the final rank meets it."""
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
    assert factor.form.error_bound(factor.state) <= target * factor.largest()
    # From step 0 on, the rank grows by half at each reading, and the next step takes the new rank.
    assert [path[step] for step in (0, 1, 10, 11, 21)] == [2, 3, 3, 5, 8]


def test_rank_shrinks_with_the_rank_of_the_data():
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
    """A linear model with the squared error, whose exact curvature is A ⊗ (2/C) I, and its training step."""

    def __init__(self, damping, factor=1.0, **options):
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 10, dtype=torch.float64)
        self.inputs, self.targets = torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
        self.factor = factor
        self.preconditioner = KFAC(self.layer, EXACT, damping=damping, curvature="type-2", **{"clip": None} | options)

    def loss(self):
        return self.factor * nn.functional.mse_loss(self.layer(self.inputs), self.targets)

    def step(self, rate):
        self.preconditioner.curvature(self.layer(self.inputs), loss="mse")
        loss = self.loss()
        stepped(self.layer, self.preconditioner, loss)
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
def test_damping_falls_if_the_model_is_right_and_rises_if_the_loss_is_steeper(factor, expected):
    """Every second step, also from a checkpoint. The curvature ignores the factor of the loss."""
    task = Quadratic(Adaptive(0.1, every=2, factor=0.9), factor)
    assert task.step(1.0) is not None
    assert task.preconditioner._adapted_damping == pytest.approx(expected)
    assert task.step(1.0) is None
    resumed = Quadratic(Adaptive(0.1, every=2)).preconditioner
    resumed.load_state_dict(task.preconditioner.state_dict())
    assert resumed._adapted_damping == task.preconditioner._adapted_damping == pytest.approx(expected)


def test_bounds_hold_and_a_loss_that_is_not_finite_raises_the_damping():
    adaptive = Adaptive(0.1, every=1, factor=0.5, least=0.08, most=0.15)
    # The ratio is infinite too if the curvature predicts that the loss grows, and it becomes infinite.
    found = [adaptive.next(0.1, ratio) for ratio in (1.0, 0.5, 0.1, float("nan"), -float("inf"), float("inf"))]
    assert found == [0.08, 0.1, 0.15, 0.15, 0.15, 0.15]


def test_adapt_refuses_a_call_after_zero_grad_or_without_adaptive_damping():
    task = Quadratic(Adaptive(0.1, every=1))
    task.preconditioner.curvature(task.layer(task.inputs), loss="mse")
    loss = task.loss()
    stepped(task.layer, task.preconditioner, loss)
    task.layer.zero_grad()
    late = r"KFAC.adapt: \(model\).weight has no gradient; call adapt before zero_grad"
    with pytest.raises(RuntimeError, match=late):
        task.preconditioner.adapt(loss, task.loss)
    with pytest.raises(RuntimeError, match=r"KFAC.adapt: damping must be Adaptive"):
        KFAC(nn.Linear(3, 3)).adapt(loss, task.loss)
