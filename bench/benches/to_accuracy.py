"""Steps and seconds that a method takes to an accuracy, its options searched with a stated budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from time import perf_counter
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.benches.training_methods import network, small_factors_allowed
from bench.frame.images import Images
from brandla.demo import data
from brandla.kfac import KFAC, Strategy

BATCH = 128
# The seed of the search is none of those that are measured.
SEARCH_SEED = 1000


@dataclass(frozen=True)
class Candidate:
    """One choice of a method's options: a rate, and a strategy of ours or AdamW."""

    rate: float
    strategy: Strategy | None

    def optimizers(self, model: nn.Module) -> tuple[torch.optim.Optimizer, KFAC | None]:
        """Return what takes the steps of a model."""
        if self.strategy is None:
            return torch.optim.AdamW(model.parameters(), self.rate), None
        return torch.optim.SGD(model.parameters(), self.rate), KFAC(model, self.strategy, damping=0.03, clip=0.07)


@dataclass(frozen=True)
class Outcome:
    """Of one run: steps to the target, None where it was not reached, and the seconds and the score of each step."""

    steps: int | None
    times: list[float]
    scores: list[float]

    @property
    def seconds(self) -> float | None:
        """Seconds to the target."""
        return None if self.steps is None else sum(self.times)


def train(
    candidate: Candidate, shown: Images, width: int, steps: int, seed: int, target: float, *, search: bool = False
) -> Outcome:
    """Train for ``steps`` steps, or to the target, judging after each; only the steps are timed.

    A search trains and judges on its own parts of the images.
    """
    training, judged = shown[2:] if search else shown[:2]
    model = network(shown, width, seed)
    optimizer, preconditioner = candidate.optimizers(model)
    times, scores = [], []
    for step, (images, labels) in enumerate(data.batches(training, BATCH, steps, seed), start=1):
        start = perf_counter()
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        if preconditioner is not None:
            with small_factors_allowed():
                preconditioner.step()
        optimizer.step()
        times.append(perf_counter() - start)
        scores.append(data.accuracy(model, judged))
        if scores[-1] >= target:
            return Outcome(step, times, scores)
    return Outcome(None, times, scores)


def search(
    candidates: Sequence[Candidate], shown: Images, width: int, steps: int, target: float
) -> list[tuple[Candidate, Outcome]]:
    """Train every candidate once, judged on validation data."""
    return [(one, train(one, shown, width, steps, SEARCH_SEED, target, search=True)) for one in candidates]


def choose(trials: Sequence[tuple[Candidate, Outcome]], part: Literal["steps", "seconds"]) -> Candidate:
    """Return the candidate that reached the target in the least of what the row measures.

    Those that took equally many steps are told apart by their mean accuracy on the way, and so are those that did not
    arrive at all. Seconds are steps times the median step, which a disturbance in one of them leaves alone.
    """

    def score(trial: tuple[Candidate, Outcome]) -> tuple[float, float]:
        outcome = trial[1]
        needed = float("inf") if outcome.steps is None else outcome.steps
        return needed * (1 if part == "steps" else median(outcome.times)), -mean(outcome.scores)

    return min(trials, key=score)[0]


def grid(low: float, high: float, count: int, strategies: Sequence[Strategy | None]) -> list[Candidate]:
    """Return rates evenly spaced in their logarithm, with each of the strategies."""
    rates = [low * (high / low) ** (index / max(count - 1, 1)) for index in range(count)]
    return [Candidate(float(f"{rate:.3g}"), strategy) for strategy in strategies for rate in rates]


def middle(values: Sequence[float | None]) -> float:
    """Return the median over runs; infinite where half of them did not arrive."""
    return median(float("inf") if value is None else value for value in values)
