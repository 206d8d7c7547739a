"""scikit-learn's handwritten digits, batches of them, and the network that learns them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class Split(NamedTuple):
    """Images (m, 64), scaled to [0, 1], and their labels (m,)."""

    images: Tensor
    labels: Tensor


class Parts(NamedTuple):
    """What is trained on and judged by, in the runs that are measured and in the searches before them."""

    training: Split
    test: Split
    search_training: Split
    search_validation: Split


def load(device: str) -> Parts:
    """Load the 1,797 digits of scikit-learn: a fifth of each class tests, a fifth of the rest validates in searches."""
    images, labels = load_digits(return_X_y=True)
    training, test = _divide(images / 16, labels)
    search_training, search_validation = _divide(*training)
    return Parts(*(_on_device(part, device) for part in (training, test, search_training, search_validation)))


def batches(split: Split, size: int, steps: int, seed: int) -> Iterator[Split]:
    """Yield ``steps`` batches: epochs in random order, their incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    count = len(split.labels)
    whole = count // size
    for step in range(steps):
        if step % whole == 0:
            order = torch.randperm(count, generator=generator).to(split.labels.device)
        chosen = order[step % whole * size :][:size]
        yield Split(split.images[chosen], split.labels[chosen])


def network(width: int, device: str, seed: int) -> nn.Sequential:
    """Return the MLP 64-width-width-10 with ReLU, initialised from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
    return layers.to(device)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the images that the model classifies rightly."""
    return float((model(split.images).argmax(-1) == split.labels).float().mean())


_Arrays = tuple["np.ndarray", "np.ndarray"]


def _divide(images: np.ndarray, labels: np.ndarray) -> tuple[_Arrays, _Arrays]:
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return (parts[0], parts[2]), (parts[1], parts[3])


def _on_device(arrays: _Arrays, device: str) -> Split:
    images, labels = arrays
    return Split(
        torch.as_tensor(images, dtype=torch.float32, device=device),
        torch.as_tensor(labels, dtype=torch.int64, device=device),
    )
