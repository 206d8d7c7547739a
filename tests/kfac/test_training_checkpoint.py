"""Checkpoints through torch.distributed.checkpoint, and with options that change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from brandla.kfac import KFAC, Brand, BrandRandomized, Exact, Strategy, read_state
from kfac.networks import batch, mlp

# One process is what is meant.
pytestmark = [pytest.mark.filterwarnings("ignore:KFAC"), pytest.mark.filterwarnings("ignore:torch.distributed")]

STRATEGIES = {"exact": Exact(inverse_every=3), "brand": Brand(6), "brand-randomized": BrandRandomized(6, oversample=4)}


def train(model: nn.Module, preconditioner: KFAC, seeds: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in seeds:
        inputs, labels = batch(8, 10, 4, seed, torch.float32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        preconditioner.step()
        optimizer.step()


def network(seed: int = 0) -> nn.Sequential:
    return mlp(10, 40, 30, 4, dtype=torch.float32, seed=seed)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "started"])
def test_training_goes_on_bit_equal(strategy: Strategy, fresh: bool, tmp_path: Path):
    model = network()
    preconditioner = KFAC(model, strategy)
    train(model, preconditioner, range(5))
    dcp.save({"model": model.state_dict(), "kfac": preconditioner}, checkpoint_id=tmp_path)
    train(model, preconditioner, range(5, 9))

    other = network(9)
    resumed = KFAC(other, strategy)
    if fresh:
        resumed.load_state_dict(read_state(tmp_path))
        dcp.load({"model": other.state_dict()}, checkpoint_id=tmp_path)
    else:
        train(other, resumed, range(20, 22))
        dcp.load({"model": other.state_dict(), "kfac": resumed}, checkpoint_id=tmp_path)
    train(other, resumed, range(5, 9))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        if fresh and isinstance(strategy, Exact):
            # Products with eigenvectors that lay by columns, and now lie by rows, round differently.
            torch.testing.assert_close(one, two)
        else:
            assert torch.equal(one, two)


def test_a_load_that_leaves_tensors_out_is_refused(tmp_path: Path):
    model = network()
    preconditioner = KFAC(model, Brand(6))
    train(model, preconditioner, range(2))
    dcp.save({"kfac": preconditioner}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"0: the state lacks input.state.*use brandla.kfac.read_state"):
        dcp.load({"kfac": KFAC(network(), Brand(6))}, checkpoint_id=tmp_path)


def test_a_checkpoint_before_any_data(tmp_path: Path):
    dcp.save({"kfac": KFAC(network(), Brand(6))}, checkpoint_id=tmp_path)
    preconditioner = KFAC(network(), Brand(6))
    preconditioner.load_state_dict(read_state(tmp_path))
    train(preconditioner._model, preconditioner, range(2))
    message = "read_state: the checkpoint must have 'preconditioner'; it has ['kfac']"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_state(tmp_path, "preconditioner")


def test_options_may_change():
    model, other = network(), network()
    preconditioner = KFAC(model, Brand(6), damping=0.1, factor_every=4)
    train(model, preconditioner, range(3))
    resumed = KFAC(other, Brand(6), damping=0.2, clip=None, clip_by="kl", decay=0.5, application="two-sided")
    resumed.load_state_dict(preconditioner.state_dict())
    train(other, resumed, range(3, 5))
    assert resumed.state_dict()["steps"] == 5


def test_another_format_is_refused():
    preconditioner = KFAC(network(), Brand(6))
    state = {**preconditioner.state_dict(), "format": 3}
    message = "KFAC.load_state_dict: the state must have format 5; got 3; one of another version cannot be read"
    with pytest.raises(ValueError, match=re.escape(message)):
        preconditioner.load_state_dict(state)
