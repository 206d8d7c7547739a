"""Ways to train the MLP pixels-width-width-10, ours and other people's: one step at a time, or to an accuracy."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
from statistics import mean, median
from time import perf_counter
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.benches.resources import torch_calls
from bench.frame.images import CLASSES, Images, mlp, seeded
from brandla.demo import data
from brandla.demo.data import Split
from brandla.demo.training import Trainer
from brandla.kfac import KFAC, Strategy

Step = Callable[[], None]
BATCH = 128
# The seed of the search is none of those that are measured.
SEARCH_SEED = 1000


@dataclass(frozen=True)
class Setting:
    """Images, the width of the hidden layers, and the size of a batch."""

    shown: Images
    width: int = 1024
    batch: int = BATCH

    def network(self, seed: int = 0) -> nn.Module:
        return seeded(seed, mlp, self.shown.training.images.shape[1], self.width)

    def batches(self) -> Iterator[Split]:
        """Return an endless stream of batches, the same for every method."""
        epochs = (data.batches(self.shown.training, self.batch, 1000, 0) for _ in itertools.count())
        return itertools.chain.from_iterable(epochs)


@contextmanager
def unsaid(kind: type[Warning]) -> Iterator[None]:
    """Let warnings of a kind be silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kind)
        yield


def sgd(setting: Setting, strategy: Strategy | None = None) -> Step:
    """Return SGD's step, with one of our preconditioners if there is one, curvature at every step."""
    model, batches = setting.network(), setting.batches()
    kfac = None if strategy is None else KFAC(model, strategy)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.03), kfac)
    return lambda: trainer.step(next(batches))


def calls_of_a_step(setting: Setting, strategy: Strategy) -> int:
    """Return how many calls of torch ``KFAC.step`` makes, once it has a few steps behind it."""
    model, counts = setting.network(), []
    kfac = KFAC(model, strategy)
    for inputs, labels in itertools.islice(setting.batches(), 4):
        model.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        with unsaid(UserWarning):
            counts.append(torch_calls(kfac.step))
    return counts[-1]


def bare(setting: Setting, rank: int, columns: int) -> Step:
    """Return SGD's step, and of B-KFAC's only the root form's products with tall matrices and eigendecompositions.

    That is a floor. Of each low-rank factor: new columns beside the root and one another, the rotation of both, and the
    application to the pair whose product is the gradient. Then that product. Nothing truncates, damps or checks.
    """
    plain, width, batch = sgd(setting), setting.width, setting.batch
    order, pixels = rank + columns, setting.shown.training.images.shape[1]
    # Inputs with their bias, and gradients of the hidden layers.
    sides = [torch.randn(n, batch) for n in (pixels + 1, width, width + 1, width, width + 1)]
    roots = [torch.randn(len(side), rank) / width**0.5 for side in sides]
    signs, rotation = torch.randn(batch, columns), torch.randn(order, rank)
    added = torch.randn(len(sides), order, columns)
    cores = torch.diag(torch.logspace(0, -4, order)) + 0.05 / order * added @ added.mT
    last = torch.randn(batch, CLASSES)

    def step() -> None:
        plain()
        torch.linalg.eigh(cores)
        solved = []
        for side, root in zip(sides, roots, strict=True):
            taken = side @ signs if columns < batch else side
            _ = root.mT @ taken, taken.mT @ taken
            new = (root @ rotation[:rank]).addmm_(taken, rotation[rank:])
            solved.append(new @ (new.mT @ side))
        for inputs, gradients in zip(solved[::2], (*solved[1::2], last.mT), strict=True):
            _ = gradients @ inputs.mT

    return step


def _stepping(setting: Setting, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor, Tensor], Any]) -> Step:
    """Return a step of an optimizer on the next batch, its gradients taken by ``backward``."""
    batches = setting.batches()

    def step() -> None:
        inputs, labels = next(batches)
        optimizer.zero_grad()
        with unsaid(FutureWarning):
            backward(inputs, labels)
        optimizer.step()

    return step


def singd(setting: Setting, period: int) -> Step:
    """Return a step of SINGD with dense structures, of the package ``singd``."""
    from singd.optim.optimizer import SINGD

    model = setting.network()
    optimizer = SINGD(model, lr=1e-3, T=period, structures=("dense", "dense"))
    return _stepping(setting, optimizer, lambda inputs, labels: cross_entropy(model(inputs), labels).backward())


def maker(model: nn.Module, batch: int, period: int, damping: float, weight: float) -> Any:
    """Return what takes gradients, preconditioned by K-FAC with the empirical Fisher, of the package ``asdfghjkl``."""
    with unsaid(DeprecationWarning):
        import asdl
        from asdl.precondition import natural_gradient

    if not torch.backends.cuda.is_built():
        # Its named ranges ask for a CUDA build of torch.
        natural_gradient.nvtx = SimpleNamespace(range=lambda *_: nullcontext())
    every = {"curvature_upd_interval": 1, "preconditioner_upd_interval": period}
    config = asdl.PreconditioningConfig(data_size=batch, damping=damping, ema_decay=weight, **every)
    return asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp")


def asdfghjkl(setting: Setting, period: int) -> Step:
    """Return a step of asdfghjkl's K-FAC, inverses renewed periodically."""
    model = setting.network()
    made = maker(model, setting.batch, period, 0.03, 0.05)

    def backward(inputs: Tensor, labels: Tensor) -> None:
        made.setup_loss_call(cross_entropy, made.setup_model_call(model, inputs), labels)
        made.forward_and_backward()

    return _stepping(setting, torch.optim.SGD(model.parameters(), 0.01), backward)


class Candidate(NamedTuple):
    """One choice of a method's options: a rate, and a strategy of ours or AdamW."""

    rate: float
    strategy: Strategy | None


def grid(low: float, high: float, count: int, strategies: Sequence[Strategy | None]) -> list[Candidate]:
    """Return rates evenly spaced in their logarithm, with each of the strategies."""
    rates = np.geomspace(low, high, count)
    return [Candidate(float(f"{rate:.3g}"), strategy) for strategy in strategies for rate in rates]


def train(candidate: Candidate, setting: Setting, most: int, target: float, seed: int = SEARCH_SEED) -> dict[str, Any]:
    """Train to the target, judging after each step: steps and seconds, infinite where ``most`` steps did not arrive.

    Beside them the median step and the mean score on the way. The search trains and judges on its own parts of the
    images. Only the steps are timed, here and not by pytest-benchmark: they are one run, and each is another call.
    """
    training, judged = setting.shown[2:] if seed == SEARCH_SEED else setting.shown[:2]
    model, strategy = setting.network(seed), candidate.strategy
    kind = torch.optim.AdamW if strategy is None else torch.optim.SGD
    kfac = None if strategy is None else KFAC(model, strategy, damping=0.03, clip=0.07)
    trainer = Trainer(model, kind(model.parameters(), candidate.rate), kfac)
    times, scores = [], []
    for batch in data.batches(training, setting.batch, most, seed):
        start = perf_counter()
        trainer.step(batch)
        times.append(perf_counter() - start)
        scores.append(data.accuracy(model, judged))
        if scores[-1] >= target:
            break
    needed = (len(times), sum(times)) if scores[-1] >= target else (inf, inf)
    return {"steps": needed[0], "seconds": needed[1], "step": median(times), "score": mean(scores)}


def choose(candidates: Sequence[Candidate], trials: pd.DataFrame, part: Literal["steps", "seconds"]) -> Candidate:
    """Return the candidate that reached the target in the least of what the row measures, by one trial of each.

    Those that took equally many steps are told apart by their mean score on the way, and so are those that did not
    arrive at all. Seconds are steps times the median step, which a disturbance in one of them leaves alone.
    """
    needed = trials["steps"] * (trials["step"] if part == "seconds" else 1)
    best = trials.assign(needed=needed).sort_values(["needed", "score"], ascending=[True, False])
    return candidates[best.index[0]]
