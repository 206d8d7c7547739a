"""A small transformer that learns to write like Python's manual: ``python -m examples.transformer``.

It reads some letters of `examples.manual`, and learns to predict the next letter.
"""

from __future__ import annotations

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples import manual
from examples.loop import Task, compare
from examples.systems import select_systems

CONTEXT, WIDTH, HEADS, DEPTH = 32, 64, 4, 2


class Block(nn.Module):
    """Attention to the letters so far, then two Linears. Each part is added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.before_linear = nn.LayerNorm(WIDTH)
        self.linear = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.register_buffer("future", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1))

    def forward(self, states: Tensor) -> Tensor:
        """Map states (batch, context, width) to new states."""
        normed = self.before_attention(states)
        attended, _ = self.attention(normed, normed, normed, attn_mask=self.future, need_weights=False)
        states = states + attended
        return states + self.linear(self.before_linear(states))


class Transformer(nn.Module):
    """Predicts the next letter at every position of a text."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, letters)

    def forward(self, text: Tensor) -> Tensor:
        """Map letters (batch, context) to scores (batch, context, letters)."""
        positions = torch.arange(text.shape[1], device=text.device).expand_as(text)
        return self.head(self.norm(self.blocks(self.letters(text) + self.positions(positions))))


def task() -> Task:
    """Return the transformer with its text, of which a tenth is held out."""
    letters, training, rest = manual.text()
    held_out = manual.stretches(rest, torch.arange(0, 64 * CONTEXT, CONTEXT), CONTEXT)
    return Task(lambda: Transformer(letters), lambda: manual.batches(training, CONTEXT), held_out, _loss)


def _loss(scores: Tensor, letters: Tensor) -> Tensor:
    return cross_entropy(scores.flatten(0, 1), letters.flatten())


def main(steps: int = 60, system: str = typer.Option("all", help="one of examples.systems, or all")) -> None:
    """Train with one system or with all."""
    compare("transformer on Python's manual", task(), select_systems(system), steps)


if __name__ == "__main__":
    typer.run(main)
