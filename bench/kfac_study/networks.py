"""The networks, and how right they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bench.kfac_study.settings import Task
from brandla.demo.data import Split

CLASSES = 10
# Units of the convolutional network's hidden layer.
HIDDEN = 128
# Images that are judged at once.
CHUNK = 2500


class Judgement(NamedTuple):
    """Share of the images classified rightly, and the mean loss."""

    accuracy: float
    loss: float


def network(task: Task, pixels: int, device: str, seed: int) -> nn.Module:
    """Return the network of a task for images of so many pixels, initialised from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = mlp(pixels, task.width) if task.network == "mlp" else conv(pixels, task.width)
    return layers.to(device)


def mlp(pixels: int, width: int) -> nn.Sequential:
    """Return the MLP pixels-width-width-10 with ReLU."""
    return nn.Sequential(
        nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def conv(pixels: int, channels: int) -> nn.Sequential:
    """Return two 3 × 3 convolutions, each with ReLU and 2 × 2 pooling, and two Linear layers, for square images."""
    side = round(pixels**0.5)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        *(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(2 * channels * (side // 4) ** 2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)),
    )


@torch.no_grad()
def judge(model: nn.Module, split: Split) -> Judgement:
    """Classify all images of a split."""
    right, loss = 0.0, 0.0
    for images, labels in zip(split.images.split(CHUNK), split.labels.split(CHUNK), strict=True):
        outputs = model(images)
        right += float((outputs.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
    return Judgement(right / len(split.labels), loss / len(split.labels))
