"""Checkpoints: training goes on from them bit by bit, also through torch.distributed.checkpoint; what is refused."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.utils._pytree import tree_leaves

from brandla import Rank
from brandla.kfac import (
    KFAC,
    Brand,
    BrandCorrected,
    BrandRandomized,
    ConjugateGradient,
    ErrorBound,
    Exact,
    InverseFree,
    Randomized,
    Strategy,
    read_state,
)
from kfac.networks import Batch, assert_equal, batch, mlp, train
from kfac.systems import SYSTEMS, some_systems

# Of torch.distributed one process is what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:KFAC", "ignore:.*torch.distributed is disabled")


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


# Of every system, with a state of every shape, and at ranks that change between the checkpoint and the end.
STREAMS: dict[str, Strategy] = SYSTEMS | {
    "structured": InverseFree("hierarchical", variant="ikfac", preconditioner_every=3),
    "mean-tail": BrandRandomized(6, overwrite_every=3, tail="mean"),
    "schedule": Brand(growing),
    "schedule-cholesky": Brand(falling, compress="cholesky"),
    "schedule-corrected": BrandCorrected(growing, correct_every=seldom),
    "schedule-randomized": Randomized(falling, inverse_every=seldom),
    "rule": Brand(rule),
    "error-bound": Brand(ErrorBound(0.05, 4, 20, every=2)),
    "error-bound-cholesky": Brand(ErrorBound(0.05, 4, 20, every=seldom), compress="cholesky"),
}


def network(seed: int = 0) -> nn.Sequential:
    return mlp(10, 40, 4, dtype=torch.float32, seed=seed)


def data(*seeds: int) -> list[Batch]:
    return [batch(8, 10, 4, seed, torch.float32) for seed in range(*seeds)]


def reloaded(state: object) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(one: object, other: object) -> None:
    """The same numbers and tensors, in the same order."""
    for left, right in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


@pytest.mark.parametrize("strategy", STREAMS.values(), ids=STREAMS)
def test_training_goes_on_bit_equal(strategy: Strategy):
    """And a state stays as it is meanwhile."""
    model, fresh = network(), network(9)
    preconditioner = KFAC(model, strategy, clip_by="spectral", clip=0.01)
    train(model, preconditioner, data(4))
    state = {"model": copy.deepcopy(model.state_dict()), "kfac": preconditioner.state_dict()}
    checkpoint = reloaded(state)
    train(model, preconditioner, data(4, 9))
    assert_same(state, checkpoint)
    fresh.load_state_dict(checkpoint["model"])
    resumed = KFAC(fresh, strategy, clip_by="spectral", clip=0.01)
    resumed.load_state_dict(checkpoint["kfac"])
    train(fresh, resumed, data(4, 9))
    assert_equal(model, fresh)
    assert [row.rank for row in preconditioner.report().factors] == [row.rank for row in resumed.report().factors]


@some_systems("exact", "brand", "singd")
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "started"])
def test_training_goes_on_through_torch_distributed(strategy: Strategy, fresh: bool, tmp_path: Path):
    model, other = network(), network(9)
    # Whose direction is state too.
    preconditioner, resumed = (KFAC(own, strategy, clip_by="spectral", clip=0.01) for own in (model, other))
    train(model, preconditioner, data(5))
    dcp.save({"model": model.state_dict(), "kfac": preconditioner}, checkpoint_id=tmp_path)
    train(model, preconditioner, data(5, 9))
    if fresh:
        resumed.load_state_dict(read_state(tmp_path))
        dcp.load({"model": other.state_dict()}, checkpoint_id=tmp_path)
    else:
        train(other, resumed, data(20, 22))
        dcp.load({"model": other.state_dict(), "kfac": resumed}, checkpoint_id=tmp_path)
    train(other, resumed, data(5, 9))
    if fresh and isinstance(strategy, Exact):
        # Products with eigenvectors that lay by columns, and now lie by rows, round differently.
        torch.testing.assert_close(list(model.parameters()), list(other.parameters()))
    else:
        assert_equal(model, other)


@pytest.mark.parametrize("strategy", [Brand(6), InverseFree()], ids=["brand", "singd"])
def test_a_load_in_place_of_a_new_preconditioner_is_refused(strategy: Strategy, tmp_path: Path):
    """Its tensors have no place yet, and would be left out."""
    model = network()
    preconditioner, resumed = KFAC(model, strategy), KFAC(network(), strategy)
    train(model, preconditioner, data(2))
    dcp.save({"kfac": preconditioner}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"0: the state lacks input.(state|direction).*: use brandla.kfac.read_state"):
        dcp.load({"kfac": resumed}, checkpoint_id=tmp_path)
    assert not any(layer.curvature.started for layer in resumed._layers)


def test_a_checkpoint_before_any_data(tmp_path: Path):
    model = network()
    dcp.save({"kfac": KFAC(network(), Brand(6))}, checkpoint_id=tmp_path)
    preconditioner = KFAC(model, Brand(6))
    preconditioner.load_state_dict(read_state(tmp_path))
    train(model, preconditioner, data(2))
    message = "read_state: the checkpoint must have 'preconditioner'; it has ['kfac']"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_state(tmp_path, "preconditioner")


def test_options_may_change():
    model, other = network(), network()
    preconditioner = KFAC(model, Brand(6), damping=0.1, factor_every=4)
    train(model, preconditioner, data(3))
    resumed = KFAC(other, Brand(6), damping=0.2, clip=None, clip_by="kl", decay=0.5, application="two-sided")
    resumed.load_state_dict(preconditioner.state_dict())
    train(other, resumed, data(3, 5))
    assert resumed.state_dict()["steps"] == 5


def test_a_state_of_another_run_is_refused_and_changes_nothing():
    model, other = mlp(10, 40, 30, 4, dtype=torch.float32), network()
    ours, theirs = KFAC(model, Brand(6)), KFAC(other, Brand(6))
    train(model, ours, data(2))
    before, wrong = ours.state_dict(), ours.state_dict()
    wrong["layers"]["2"]["curvature"]["output"]["state"]["root"] = torch.zeros(3, 6)
    for state, message in (
        (theirs.state_dict(), "same layers; missing ['4'], unexpected []"),
        (wrong, "2 (output): root must have shape (30, 6); got (3, 6)"),
        ({**before, "format": 3}, "must have format 6; got 3; one of another version cannot be read"),
        ({}, "format"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ours.load_state_dict(state)
    assert_same(before, ours.state_dict())


OTHER_OPTIONS = {
    "rank": (Brand(7), Brand(6)),
    "schedule": (Brand(growing), Brand(falling)),
    "structure": (InverseFree("diagonal"), InverseFree()),
    "variant": (InverseFree(variant="ikfac"), InverseFree()),
    "iterations": (ConjugateGradient(3), ConjugateGradient()),
}
# Each beside the next, which keeps other tensors or the same ones for another purpose.
PAIRS = {f"{one}-{other}": (SYSTEMS[one], SYSTEMS[other]) for one, other in zip(SYSTEMS, [*SYSTEMS][1:], strict=False)}


@pytest.mark.parametrize(("asked", "other"), (OTHER_OPTIONS | PAIRS).values(), ids=OTHER_OPTIONS | PAIRS)
def test_a_state_of_another_strategy_is_refused(asked: Strategy, other: Strategy):
    for asking, given in ((asked, other), (other, asked)):
        model = network()
        preconditioner, resumed = KFAC(model, given), KFAC(network(), asking)
        train(model, preconditioner, data(1))
        message = f"0: the strategy must be {asking}, as in this preconditioner; the state has {given}"
        with pytest.raises(ValueError, match=re.escape(message)):
            resumed.load_state_dict(preconditioner.state_dict())


@some_systems("exact", "ekfac", "singd", "conjugate-gradient")
def test_a_state_of_another_kind_of_layer_is_refused(strategy: Strategy):
    model = nn.Sequential(nn.LayerNorm(10))
    preconditioner = KFAC(model, strategy)
    train(model, preconditioner, data(1))
    resumed = KFAC(nn.Sequential(nn.Linear(10, 10)), strategy)
    with pytest.raises(ValueError, match=re.escape("KFAC.load_state_dict: 0")):
        resumed.load_state_dict(preconditioner.state_dict())


@pytest.mark.parametrize("strategy", [Exact(), InverseFree()], ids=["exact", "singd"])
def test_a_state_of_another_shape_is_refused(strategy: Strategy):
    wider, model = nn.Sequential(nn.Linear(11, 4)), nn.Sequential(nn.Linear(10, 4))
    preconditioner = KFAC(model, strategy)
    train(model, preconditioner, data(1))
    with pytest.raises(ValueError, match=r"0 \(input\): (root|dense) must have shape"):
        KFAC(wider, strategy).load_state_dict(preconditioner.state_dict())


@some_systems("exact", "ekfac", "singd")
def test_a_frozen_layer_takes_no_memory_until_it_thaws(strategy: Strategy):
    frozen, model = network(), network()
    frozen[0].weight.requires_grad_(False)
    preconditioner, expected = KFAC(frozen, strategy), KFAC(model, strategy)
    report = preconditioner.report()
    assert report.unsupported == {"0": "frozen"}
    assert {row.layer for row in report.factors} == {"2"}
    saved = preconditioner.state_dict()
    assert saved["layers"]["0"]["curvature"] == {}
    preconditioner.load_state_dict(saved)
    frozen[0].weight.requires_grad_(True)
    train(frozen, preconditioner, data(1))
    train(model, expected, data(1))
    assert_equal(frozen, model)


@some_systems("exact", "ekfac", "singd")
def test_a_frozen_layer_goes_on_from_a_checkpoint_when_it_thaws(strategy: Strategy):
    frozen, model = network(), network()
    expected = KFAC(model, strategy)
    train(model, expected, data(1))
    frozen[0].weight.requires_grad_(False)
    frozen.load_state_dict(model.state_dict())
    preconditioner = KFAC(frozen, strategy)
    preconditioner.load_state_dict(expected.state_dict())
    assert preconditioner.report().unsupported == {}
    frozen[0].weight.requires_grad_(True)
    train(frozen, preconditioner, data(1, 2))
    train(model, expected, data(1, 2))
    assert_equal(frozen, model)
