"""Ways to take one training step, ours and other people's, each on a network of its own."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType, SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bench.benches.calls import torch_calls
from bench.frame.images import CLASSES, Images, mlp, mnist, standardised
from brandla.demo import data
from brandla.demo.data import Split
from brandla.kfac import KFAC, Strategy

Step = Callable[[], None]


@cache
def images(quick: bool) -> Images:
    """Return MNIST's images, standardised; for a short run scikit-learn's digits, which need no further package."""
    return standardised(Images(*data.load("cpu")) if quick else mnist(), "cpu")


def network(shown: Images, width: int, seed: int = 0) -> nn.Sequential:
    """Return the MLP pixels-width-width-10, initialised from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp(shown.training.images.shape[1], width)


class Batches:
    """An endless stream of batches, the same for every method of a seed."""

    def __init__(self, shown: Images, size: int, seed: int = 0) -> None:
        self._stream: Iterator[Split] = itertools.chain.from_iterable(
            data.batches(shown.training, size, 1000, seed) for _ in itertools.count()
        )

    def __next__(self) -> Split:
        return next(self._stream)


def sgd(shown: Images, width: int, batch: int) -> Step:
    """Plain SGD."""
    return preconditioned(shown, width, batch, None)


def preconditioned(shown: Images, width: int, batch: int, strategy: Strategy | None) -> Step:
    """SGD with one of our preconditioners, curvature at every step."""
    model, batches = network(shown, width), Batches(shown, batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    with_kfac = None if strategy is None else KFAC(model, strategy)

    def step() -> None:
        inputs, labels = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        if with_kfac is not None:
            with small_factors_allowed():
                with_kfac.step()
        optimizer.step()

    return step


def calls_of_a_step(shown: Images, width: int, batch: int, strategy: Strategy) -> int:
    """Return how many calls of torch ``KFAC.step`` makes, once it has a few steps behind it."""
    model, batches = network(shown, width), Batches(shown, batch)
    kfac, counts = KFAC(model, strategy), []
    for _ in range(4):
        inputs, labels = next(batches)
        model.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        with small_factors_allowed():
            counts.append(torch_calls(kfac.step))
    return counts[-1]


@contextmanager
def small_factors_allowed() -> Iterator[None]:
    """Say nothing of the factors of order 10, or of digits' 65, which are too small for Brand and become exact ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="KFAC: some factors")
        yield


def bare(shown: Images, width: int, batch: int, rank: int, columns: int) -> Step:
    """SGD's step, and of B-KFAC's only the root form's products with tall matrices and eigendecompositions: a floor.

    Of each low-rank factor: new columns beside the root and one another, the rotation of both, and the application to
    the pair whose product is the gradient. Then that product. Nothing truncates, damps or checks.
    """
    plain = sgd(shown, width, batch)
    order, pixels = rank + columns, shown.training.images.shape[1]
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


def singd(shown: Images, width: int, batch: int, period: int) -> Step:
    """SINGD with dense structures, of the package ``singd``."""
    from singd.optim.optimizer import SINGD

    model, batches = network(shown, width), Batches(shown, batch)
    optimizer = SINGD(model, lr=1e-3, T=period, structures=("dense", "dense"))

    def step() -> None:
        inputs, labels = next(batches)
        optimizer.zero_grad()
        with _no_future_warnings():
            cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return step


def asdfghjkl(shown: Images, width: int, batch: int, period: int) -> Step:
    """K-FAC with the empirical Fisher, inverses renewed periodically, of the package ``asdfghjkl``."""
    asdl = _asdl()
    model, batches = network(shown, width), Batches(shown, batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    config = asdl.PreconditioningConfig(
        data_size=batch,
        damping=0.03,
        ema_decay=0.05,
        curvature_upd_interval=1,
        preconditioner_upd_interval=period,
    )
    maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_emp")

    def step() -> None:
        inputs, labels = next(batches)
        optimizer.zero_grad()
        outputs = maker.setup_model_call(model, inputs)
        maker.setup_loss_call(cross_entropy, outputs, labels)
        with _no_future_warnings():
            maker.forward_and_backward()
        optimizer.step()

    return step


def _asdl() -> ModuleType:
    """Import asdfghjkl, whose named ranges ask for a CUDA build of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import asdl
        from asdl.precondition import natural_gradient

    if not torch.backends.cuda.is_built():
        natural_gradient.nvtx = SimpleNamespace(range=lambda *_: nullcontext())
    return asdl


@contextmanager
def _no_future_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
