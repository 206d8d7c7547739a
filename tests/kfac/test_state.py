"""Checkpoints, reports, substitutes and bad input of the preconditioner."""

from __future__ import annotations

import io
import re

import pytest
import torch
from torch import nn

from brandla.kfac import KFAC, Brand, BrandCorrected, BrandRandomized, Exact, Randomized, Strategy
from kfac.networks import batch, gradients, mlp

STRATEGIES = {
    "exact": Exact(inverse_every=3),
    "randomized-svd": Randomized(6, method="svd", oversample=4, inverse_every=3),
    "randomized-eigh": Randomized(6, oversample=4, inverse_every=3),
    "brand": Brand(6),
    "brand-cholesky": Brand(6, compress="cholesky"),
    "brand-eigh": Brand(6, form="eigh"),
    "brand-randomized": BrandRandomized(6, overwrite_every=4, oversample=4),
    "brand-corrected": BrandCorrected(6, correct_every=3),
}


def train(model: nn.Module, preconditioner: KFAC, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        inputs, labels = batch(8, 10, 4, seed, torch.float32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        preconditioner.step()
        optimizer.step()


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.filterwarnings("ignore:KFAC")
def test_training_goes_on_bit_equal_from_a_checkpoint(strategy: Strategy):
    model = mlp(10, 40, 30, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = KFAC(model, strategy)
    train(model, preconditioner, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "kfac": preconditioner.state_dict()}, file)
    train(model, preconditioner, optimizer, range(5, 12))

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    fresh = mlp(10, 40, 30, 4, dtype=torch.float32, seed=9)
    fresh.load_state_dict(checkpoint["model"])
    resumed = KFAC(fresh, strategy)
    resumed.load_state_dict(checkpoint["kfac"])
    train(fresh, resumed, torch.optim.SGD(fresh.parameters(), lr=0.1), range(5, 12))
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:KFAC")
def test_a_state_dict_does_not_change_when_training_goes_on():
    model = mlp(10, 40, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = KFAC(model, Exact())
    train(model, preconditioner, optimizer, range(2))
    state = preconditioner.state_dict()
    dense = state["layers"]["0"]["curvature"]["input"]["state"]["dense"]
    kept = dense.clone()
    train(model, preconditioner, optimizer, range(2, 4))
    assert torch.equal(dense, kept)


@pytest.mark.filterwarnings("ignore:KFAC")
def test_a_state_of_another_run_is_refused_and_changes_nothing():
    model, other = mlp(10, 40, 30, 4, dtype=torch.float32), mlp(10, 40, 4, dtype=torch.float32)
    ours, theirs = KFAC(model, Brand(6)), KFAC(other, Brand(6))
    train(model, ours, torch.optim.SGD(model.parameters(), lr=0.1), range(2))
    before = ours.state_dict()
    with pytest.raises(ValueError, match=re.escape("same layers; missing ['4'], unexpected []")):
        ours.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"the strategy must be Brand.*rank=7.*the state has Brand.*rank=6"):
        KFAC(model, Brand(7)).load_state_dict(before)
    wrong = ours.state_dict()
    wrong["layers"]["2"]["curvature"]["output"]["state"]["root"] = torch.zeros(3, 6)
    with pytest.raises(ValueError, match=re.escape("2 (output): root must have shape (30, 6); got (3, 6)")):
        ours.load_state_dict(wrong)
    with pytest.raises(ValueError, match="format"):
        ours.load_state_dict({})
    after = ours.state_dict()
    assert after["steps"] == before["steps"]
    assert torch.equal(
        after["layers"]["0"]["curvature"]["output"]["state"]["root"],
        before["layers"]["0"]["curvature"]["output"]["state"]["root"],
    )


def test_report_says_what_each_factor_got_and_why():
    model = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.PReLU(200), nn.Linear(200, 300), nn.Conv1d(1, 1, 1))
    preconditioner = KFAC(model[:4], Brand(8))
    nn.functional.cross_entropy(model[:4](torch.randn(16, 10)), torch.arange(16)).backward()
    with pytest.warns(UserWarning, match="too small for the strategy"):
        preconditioner.step()
    nn.functional.cross_entropy(model[:4](torch.randn(16, 10)), torch.arange(16)).backward()
    # Said once: a second warning would be an error.
    preconditioner.step()
    report = preconditioner.report()
    rows = {(row.layer, row.side): row for row in report.factors}
    assert report.unsupported == {"2": "PReLU is not known"}
    small, large = rows["0", "input"], rows["3", "output"]
    assert small.strategy.startswith("Exact(")
    assert small.reason == "rank 8 takes no less memory than the matrix of order n = 11"
    assert large.strategy.startswith("Brand(")
    assert (large.rank, large.n, large.reason) == (8, 300, "")
    assert large.bytes == 4 * (300 * 8 + 8 * 8 + 3)
    assert large.dense_bytes == 4 * 300 * 300
    assert large.error_bound is not None
    assert "left to the optimizer:\n  2: PReLU is not known" in str(report)
    assert "Brand" in str(report)


@pytest.mark.parametrize("form", ["root", "eigh"])
def test_brand_memory_is_linear_in_the_layer(form: str):
    sizes = []
    for width in (100, 200, 400):
        layer = nn.Linear(width, width, bias=False)
        preconditioner = KFAC(layer, Brand(8, form=form))
        layer(torch.randn(4, width)).square().mean().backward()
        preconditioner.step()
        sizes.append(preconditioner.report().factors[0].bytes)
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


def test_reported_bound_holds():
    layer = nn.Linear(80, 60, bias=False, dtype=torch.float64)
    preconditioner = KFAC(layer, Brand(6), decay=0.9)
    dense = torch.zeros(80, 80, dtype=torch.float64)
    for seed in range(12):
        inputs, labels = batch(8, 80, 60, seed)
        layer.zero_grad()
        nn.functional.cross_entropy(layer(inputs), labels).backward()
        preconditioner.step()
        dense = 0.9 * dense + 0.1 * inputs.T @ inputs / 8
    dense /= 1 - 0.9**12
    row = preconditioner.report().factors[0]
    kept = preconditioner.state_dict()["layers"]["(model)"]["curvature"]["input"]["state"]
    approximation = kept["root"] @ kept["root"].T
    error = torch.linalg.matrix_norm(dense - approximation, 2).item()
    assert error <= row.error_bound <= 25 * error


@pytest.mark.parametrize("strategy", [Brand(8), BrandRandomized(8), BrandCorrected(8)], ids=repr)
def test_a_factor_with_a_large_batch_keeps_its_strategy(strategy: Strategy):
    layer = nn.Linear(100, 90, bias=False)
    preconditioner = KFAC(layer, strategy)
    layer(torch.randn(950, 100)).square().mean().backward()
    preconditioner.step()
    assert {row.strategy for row in preconditioner.report().factors} == {str(strategy)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping": 0.0}, ValueError, "KFAC: damping must be finite and > 0; got 0.0"),
        ({"damping": -1.0}, ValueError, "damping must be finite and > 0; got -1.0"),
        ({"clip": 0.0}, ValueError, "clip must be finite and > 0, or None; got 0.0"),
        ({"decay": 1.0}, ValueError, "decay must be in [0, 1); got 1.0"),
        ({"factor_every": 0}, ValueError, "factor_every must be at least 1; got 0"),
        ({"factor_every": 1.5}, TypeError, "factor_every must be an int; got float 1.5"),
        ({"sharing": "share"}, ValueError, "sharing must be 'expand' or 'reduce'; got 'share'"),
        ({"sharing": {"nowhere": "reduce"}}, ValueError, "it has no module 'nowhere'"),
        ({"damping_scale": "log"}, ValueError, "damping_scale must be 'relative' or 'absolute'; got 'log'"),
        ({"application": "linear"}, ValueError, "application must be 'auto' or 'two-sided'; got 'linear'"),
        ({"inverse": "brand"}, TypeError, "inverse must be a strategy such as Brand(rank=128), or None; got str"),
        ({"inverse": Brand}, TypeError, "inverse must be a strategy such as Brand(rank=128), or None; got Brand"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        KFAC(mlp(10, 20, 4), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Brand(0), "Brand: rank must be at least 1; got 0"),
        (lambda: Brand(4, form="sym"), "Brand: form must be 'root' or 'eigh'; got 'sym'"),
        (lambda: Brand(4, compress="qr"), "Brand: compress must be 'eigh' or 'cholesky'; got 'qr'"),
        (lambda: Brand(4, form="eigh", compress="cholesky"), "Brand: compress must be 'eigh' for form='eigh'"),
        (lambda: Brand(4, tail="largest"), "Brand: tail must be a number >= 0, 'mean' or 'smallest'; got 'largest'"),
        (lambda: Exact(inverse_every=0), "Exact: inverse_every must be at least 1; got 0"),
        (lambda: Randomized(4, method="qr"), "Randomized: method must be 'svd' or 'eigh'; got 'qr'"),
        (lambda: Randomized(4, oversample=-1), "Randomized: oversample must be at least 0; got -1"),
        (lambda: BrandRandomized(4, overwrite_every=0), "BrandRandomized: overwrite_every must be at least 1"),
        (lambda: BrandCorrected(4, fraction=0.0), "BrandCorrected: fraction must be in (0, 1]; got 0.0"),
    ],
)
def test_bad_strategies_are_refused(make: object, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_model_without_a_known_layer_is_refused():
    with pytest.raises(ValueError, match=r"KFAC: the model must have an nn.Linear.*PReLU.*optimizer alone"):
        KFAC(nn.Sequential(nn.PReLU(), nn.ReLU()), Exact())


def test_frozen_layers_are_left_alone():
    model = mlp(10, 20, 4, dtype=torch.float32)
    model[0].weight.requires_grad_(False)
    preconditioner = KFAC(model, Exact())
    inputs, labels = batch(8, 10, 4, dtype=torch.float32)
    nn.functional.cross_entropy(model(inputs), labels).backward()
    bias = model[0].bias.grad.clone()
    preconditioner.step()
    started = {row.layer for row in preconditioner.report().factors if row.rank is not None}
    assert started == {"2"}
    assert torch.equal(model[0].bias.grad, bias)
    assert len(gradients(model)) == 3
