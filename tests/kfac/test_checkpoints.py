"""Checkpoints: training continues bit by bit, also through torch.distributed.checkpoint; wrong states are refused."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.utils._pytree import tree_leaves

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
    read_state,
)
from kfac.networks import assert_equal, batch, mlp, through_a_file, train
from kfac.systems import SYSTEMS, falling, growing, rule, seldom, some_systems

# One process without torch.distributed is intended here.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled")

# Every system, states of every shape, and ranks that change between the checkpoint and the end.
STREAMS = SYSTEMS | {
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
network = partial(mlp, 10, 40, 4, dtype=torch.float32)


def data(*seeds):
    return [batch(8, 10, 4, seed, torch.float32) for seed in range(*seeds)]


def trained(strategy, model=None, steps=1, **options):
    """Train a network on the first batches; return it and its preconditioner."""
    model = network() if model is None else model
    preconditioner = KFAC(model, strategy, **options)
    train(model, preconditioner, data(steps))
    return model, preconditioner


def assert_same(one, other):
    """Assert that both have the same numbers and tensors, in the same order."""
    for left, right in zip(tree_leaves(one), tree_leaves(other), strict=True):
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


# With this clip, the direction is part of the state.
SPECTRAL = {"clip_by": "spectral", "clip": 0.01}
WAYS = {
    **{(name, "file"): own for name, own in STREAMS.items()},
    **{(name, way): SYSTEMS[name] for name in ("exact", "brand", "singd") for way in ("read", "in-place")},
}


@pytest.mark.parametrize("name", WAYS, ids="-".join)
def test_training_goes_on_bit_equal(name, tmp_path):
    """From a file and through torch.distributed; later training does not change a state."""
    strategy, (_, way) = WAYS[name], name
    model, preconditioner = trained(strategy, steps=4, **SPECTRAL)
    state = {"model": copy.deepcopy(model.state_dict()), "kfac": preconditioner.state_dict()}
    checkpoint = through_a_file(state)
    if way != "file":
        dcp.save({"model": model.state_dict(), "kfac": preconditioner}, checkpoint_id=tmp_path)
    train(model, preconditioner, data(4, 7))
    assert_same(state, checkpoint)
    other, resumed = trained(strategy, network(seed=9), steps=2 if way == "in-place" else 0, **SPECTRAL)
    if way == "in-place":
        dcp.load({"model": other.state_dict(), "kfac": resumed}, checkpoint_id=tmp_path)
    else:
        other.load_state_dict(checkpoint["model"])
        resumed.load_state_dict(checkpoint["kfac"] if way == "file" else read_state(tmp_path))
    train(other, resumed, data(4, 7))
    if name == ("exact", "read"):
        # The eigenvectors were stored by columns and are now stored by rows, so products round differently.
        torch.testing.assert_close(list(model.parameters()), list(other.parameters()))
    else:
        assert_equal(model, other)
    assert [row.rank for row in preconditioner.report().factors] == [row.rank for row in resumed.report().factors]


@some_systems("brand", InverseFree())
def test_a_load_in_place_of_a_new_preconditioner_is_refused(strategy, tmp_path):
    """It has no tensors yet to load into, so they would be left out."""
    dcp.save({"kfac": trained(strategy)[1]}, checkpoint_id=tmp_path)
    resumed = KFAC(network(), strategy)
    with pytest.raises(ValueError, match=r"0: the state lacks input.(state|direction).*: use brandla.kfac.read_state"):
        dcp.load({"kfac": resumed}, checkpoint_id=tmp_path)
    assert not any(layer.curvature.started for layer in resumed._layers)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_checkpoint_may_have_no_data_and_options_may_change(steps, tmp_path):
    _, preconditioner = trained(Brand(6), steps=steps, damping=0.1, factor_every=4)
    dcp.save({"kfac": preconditioner}, checkpoint_id=tmp_path)
    options = {"damping": 0.2, "clip": None, "clip_by": "kl", "decay": 0.5, "application": "two-sided"}
    other, resumed = trained(Brand(6), steps=0, **options)
    resumed.load_state_dict(read_state(tmp_path))
    train(other, resumed, data(steps, 5))
    assert resumed.state_dict()["steps"] == 5
    message = "read_state: the checkpoint must have 'preconditioner'; it has ['kfac']"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_state(tmp_path, "preconditioner")


def test_a_state_of_another_run_is_refused_and_changes_nothing():
    _, ours = trained(Brand(6), mlp(10, 40, 30, 4, dtype=torch.float32), steps=2)
    before, wrong = ours.state_dict(), ours.state_dict()
    wrong["layers"]["2"]["curvature"]["output"]["state"]["root"] = torch.zeros(3, 6)
    for state, message in (
        (KFAC(network(), Brand(6)).state_dict(), "same layers; missing ['4'], unexpected []"),
        (wrong, "2 (output): root must have shape (30, 6); got (3, 6)"),
        ({**before, "format": 3}, "must have format 6; got 3; other versions cannot be read"),
        ({}, "format"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ours.load_state_dict(state)
    assert_same(before, ours.state_dict())


OTHERS = [
    (SYSTEMS["ekfac"], SYSTEMS["k-bfgs"]),
    (Brand(7), Brand(6)),
    (Brand(growing), Brand(falling)),
    (InverseFree("diagonal"), InverseFree()),
    (InverseFree(variant="ikfac"), InverseFree()),
    (ConjugateGradient(3), ConjugateGradient()),
]
OTHER_STRATEGY = "0: the strategy must be {}, as in this preconditioner; the state has {}"
LINEAR, NORM, WIDER = (lambda: nn.Linear(10, 10)), (lambda: nn.LayerNorm(10)), (lambda: nn.Linear(11, 10))
OTHER_SHAPE = r"0 \(input\): (root|dense) must have shape"
# Strategies and layers of a preconditioner, and of the state that it loads.
REFUSED = [
    *(
        (own, LINEAR, other, LINEAR, re.escape(OTHER_STRATEGY.format(own, other)))
        for pair in OTHERS
        for own, other in (pair, pair[::-1])
    ),
    *((SYSTEMS[own], LINEAR, SYSTEMS[own], NORM, "0") for own in ("exact", "ekfac", "singd", "conjugate-gradient")),
    *((own, WIDER, own, LINEAR, OTHER_SHAPE) for own in (Exact(), InverseFree())),
]


@pytest.mark.parametrize(("asked", "layer", "given", "other", "message"), REFUSED)
def test_a_state_of_another_strategy_or_layer_is_refused(asked, layer, given, other, message):
    _, preconditioner = trained(given, nn.Sequential(other()))
    with pytest.raises(ValueError, match=f"KFAC.load_state_dict: {message}"):
        KFAC(nn.Sequential(layer()), asked).load_state_dict(preconditioner.state_dict())


@some_systems("exact", "ekfac", "singd")
@pytest.mark.parametrize("steps", [0, 1])
def test_a_frozen_layer_takes_no_memory_and_continues_from_its_state_when_it_thaws(strategy, steps):
    model, expected = trained(strategy, steps=steps)
    frozen = copy.deepcopy(model)
    frozen[0].weight.requires_grad_(False)
    preconditioner = KFAC(frozen, strategy)
    saved = (expected if steps else preconditioner).state_dict()
    preconditioner.load_state_dict(saved)
    report = preconditioner.report()
    assert report.unsupported == ({} if steps else {"0": "frozen"})
    assert {row.layer for row in report.factors} == ({"0", "2"} if steps else {"2"})
    assert (saved["layers"]["0"]["curvature"] == {}) == (not steps)
    frozen[0].weight.requires_grad_(True)
    train(frozen, preconditioner, data(steps, steps + 1))
    train(model, expected, data(steps, steps + 1))
    assert_equal(frozen, model)
