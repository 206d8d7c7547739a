"""scikit-learn's handwritten digits, batches of them, and the network that learns them."""

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
    """What is trained on and judged by, in the runs that are measured and in the searches before them."""

    training: Split
    test: Split
    search_training: Split
    search_validation: Split


def load(device: str) -> Parts:
    """Load the 1,797 digits of scikit-learn: a fifth of each class tests, a fifth of the rest validates in searches."""
    images, labels = load_digits(return_X_y=True)
    options = {"test_size": 0.2, "random_state": 0}
    training, test = train_test_split(np.arange(len(labels)), stratify=labels, **options)
    parts = (training, test, *train_test_split(training, stratify=labels[training], **options))
    pixels = torch.as_tensor(images / 16, dtype=torch.float32, device=device)
    classes = torch.as_tensor(labels, dtype=torch.int64, device=device)
    return Parts(*(Split(pixels[part], classes[part]) for part in parts))


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


def mlp(*widths: int) -> nn.Sequential:
    """Return Linear layers between these widths, with ReLU between them."""
    return nn.Sequential(*[part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())][:-1])


def seeded(seed: int, make: Callable[..., Network], *sizes: int) -> Network:
    """Return a network of these sizes, initialised from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*sizes)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of the images that the model classifies rightly."""
    return float((model(split.images).argmax(-1) == split.labels).float().mean())
