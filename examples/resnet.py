"""A small residual network on handwritten digits: ``python -m examples.resnet``. The digits come with scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from examples.loop import Batch, Task, compare
from examples.systems import select_systems

WIDTH, DEPTH = 32, 2
BATCH = 64


class Block(nn.Module):
    """Two convolutions, added to their input. The first may halve the image."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.after_first = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.after_second = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        inner = relu(self.after_first(self.first(images)))
        return relu(self.after_second(self.second(inner)) + self.skip(images))


def resnet() -> nn.Module:
    """Return the network for images of 8 × 8 pixels."""
    blocks = [
        Block(WIDTH * 2**depth // 2 if depth else WIDTH, WIDTH * 2**depth, 1 + (depth > 0)) for depth in range(DEPTH)
    ]
    stem = [nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH * 2 ** (DEPTH - 1), 10)]
    return nn.Sequential(*stem, *blocks, *head)


def task() -> Task:
    """Return the network with its digits, of which a fifth is held out."""
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    labels = torch.tensor(classes)[order]
    held_out = len(labels) // 5

    def batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1)
        while True:
            rows = torch.randint(held_out, len(labels), (BATCH,), generator=generator)
            yield images[rows], labels[rows]

    return Task(resnet, batches, (images[:held_out], labels[:held_out]), cross_entropy, sharing="reduce")


def main(steps: int = 40, system: str = typer.Option("all", help="one of examples.systems, or all")) -> None:
    """Train with one system or with all."""
    compare("residual network on digits", task(), select_systems(system), steps)


if __name__ == "__main__":
    typer.run(main)
