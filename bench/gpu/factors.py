"""Factors and data of the public functions, on the device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import brandla
from bench.benches.problems import DECAY, UPDATES, WEIGHT, Case, columns_of
from bench.gpu.device import Device


@cache
def steady(name: str, n: int, r: int, k: int, steps: int, device: torch.device) -> Case:
    """Return the factor that a stream of deviations i^−½ settles to, by the torch forms, and the next columns."""
    update, kind = UPDATES[name]
    stream = columns_of(n, k, 0.5, seed=n + r + k)
    factor = kind.zeros(n, r, device=device)
    with brandla.backend("torch"):
        for _ in range(steps):
            factor = update(factor, next(stream).to(device), decay=DECAY, weight=WEIGHT)
    return Case(factor, next(stream).to(device))


def eigh(device: Device, n: int, r: int) -> brandla.LowRankEigh:
    """Return a factor with a random orthonormal basis and the spectrum 1/i."""
    vectors = torch.linalg.qr(device.normal(n, r)).Q
    return brandla.LowRankEigh(1 / torch.arange(1, r + 1, device=device.tensors), vectors)


def root(device: Device, n: int, r: int) -> brandla.LowRankRoot:
    """Return the same as F and S."""
    return brandla.LowRankRoot.from_eigh(eigh(device, n, r))


def on_cpu(tree: Any) -> Any:
    """Return nested tensors on the CPU, where the float64 checks run."""
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, tree)
