"""Handwritten digits of scikit-learn, their batches, and the network that learns them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


class Split(NamedTuple):
    """Images (m, 64), scaled to [0, 1], and their labels (m,)."""

    images: Tensor
    labels: Tensor


class Parts(NamedTuple):
    """Training and test data of the measured runs, and of the searches for learning rates before them."""

    training: Split
    test: Split
    search_training: Split
    search_validation: Split


def load(device: str) -> Parts:
    """Load the 1,797 digits. A fifth of each class is for tests, and a fifth of the rest validates in searches."""
    images, labels = load_digits(return_X_y=True)
    options = {"test_size": 0.2, "random_state": 0}
    training, test = train_test_split(np.arange(len(labels)), stratify=labels, **options)
    parts = (training, test, *train_test_split(training, stratify=labels[training], **options))
    pixels = torch.as_tensor(images / 16, dtype=torch.float32, device=device)
    classes = torch.as_tensor(labels, dtype=torch.int64, device=device)
    return Parts(*(Split(pixels[part], classes[part]) for part in parts))


def batches(split: Split, size: int, steps: int, seed: int) -> Iterator[Split]:
    """Yield ``steps`` batches: epochs in random order, without the last, incomplete batch of an epoch."""
    generator = torch.Generator().manual_seed(seed)
    count = len(split.labels)
    per_epoch = count // size
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(count, generator=generator).to(split.labels.device)
        chosen = order[step % per_epoch * size :][:size]
        yield Split(split.images[chosen], split.labels[chosen])


def mlp(*widths: int) -> nn.Sequential:
    """Return Linear layers from each width to the next, with ReLU between the layers."""
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def seeded(seed: int, make: Callable[..., Network], *sizes: int) -> Network:
    """Return a network of these sizes, initialised from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*sizes)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of the images that the model classifies correctly."""
    return float((model(split.images).argmax(-1) == split.labels).float().mean())
