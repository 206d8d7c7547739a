"""Python's manual as a text to learn letter by letter: ``pydoc_data.topics``, which comes with Python."""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor

from examples.loop import Batch

BATCH = 16


def text() -> tuple[int, Tensor, Tensor]:
    """Return the size of the alphabet, and the text as numbers of letters: nine tenths of it, and the rest."""
    whole = "".join(topics.values())
    alphabet = {letter: index for index, letter in enumerate(sorted(set(whole)))}
    numbers = torch.tensor([alphabet[letter] for letter in whole])
    return len(alphabet), numbers[: -len(numbers) // 10], numbers[-len(numbers) // 10 :]


def batches(numbers: Tensor, length: int) -> Iterator[Batch]:
    """Yield batches of random stretches without end."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield stretches(numbers, torch.randint(len(numbers) - length - 1, (BATCH,), generator=generator), length)


def stretches(numbers: Tensor, starts: Tensor, length: int) -> Batch:
    """Return stretches of text, and the same stretches one letter later."""
    positions = starts[:, None] + torch.arange(length)
    return numbers[positions], numbers[positions + 1]
