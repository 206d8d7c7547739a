"""The optimizers of the examples train, and what they keep is a state like any other's."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from examples.cosmos import Cosmos
from examples.digits import train
from examples.kl_shampoo import KLShampoo
from examples.soap import LowRankSOAP

OPTIMIZERS: tuple[Callable[..., Any], ...] = (Cosmos, KLShampoo, LowRankSOAP)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_trains(optimizer: Callable[..., Any]) -> None:
    assert train(optimizer, steps=30) < 0.6 * train(optimizer, steps=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_is_taken_up_again_goes_on_to_the_bit(optimizer: Callable[..., Any]) -> None:
    def step(layer: nn.Module, steps: Any, seed: int) -> None:
        steps.zero_grad()
        layer(torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        steps.step()

    layer = nn.Linear(12, 10)
    steps = optimizer(layer.parameters(), rank=4)
    for seed in range(3):
        step(layer, steps, seed)
    other = deepcopy(layer)
    again = optimizer(other.parameters(), rank=4)
    again.load_state_dict(deepcopy(steps.state_dict()))
    for seed in range(3, 5):
        step(layer, steps, seed)
        step(other, again, seed)
    assert torch.equal(layer.weight, other.weight)
