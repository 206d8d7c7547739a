"""Ways to take one training step, ours and other people's, each on a network of its own."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

from brandla.demo import data
from brandla.demo.data import Split
from brandla.kfac import KFAC, Strategy

Step = Callable[[], None]


class Batches:
    """An endless stream of batches of digits, the same for every method of a seed."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self._stream: Iterator[Split] = itertools.chain.from_iterable(
            data.batches(data.load("cpu").training, size, 1000, seed) for _ in itertools.count()
        )

    def __next__(self) -> Split:
        return next(self._stream)


def sgd(width: int, batch: int) -> Step:
    """Plain SGD."""
    return preconditioned(width, batch, None)


def preconditioned(width: int, batch: int, strategy: Strategy | None, rate: float = 0.03, **options: object) -> Step:
    """SGD with one of our preconditioners, curvature at every step."""
    model, batches = data.network(width, "cpu", 0), Batches(batch)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with_kfac = None if strategy is None else KFAC(model, strategy, **options)

    def step() -> None:
        images, labels = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        if with_kfac is not None:
            with warnings.catch_warnings():
                # The factors of orders 65 and 10 are too small for Brand, and become exact ones.
                warnings.filterwarnings("ignore", message="KFAC: some factors")
                with_kfac.step()
        optimizer.step()

    return step


def bare(width: int, batch: int, rank: int, columns: int) -> Step:
    """SGD's step, and of B-KFAC's only the products with tall matrices and the eigendecompositions: a floor for it.

    Four factors of an order of about ``width`` get ``columns`` each in one pass, and are applied to the gradients of
    the two large layers as pairs and of the others as matrices. Nothing orthonormalises, truncates or checks.
    """
    plain = sgd(width, batch)
    order = rank + columns
    basis, data = torch.randn(width, rank) / width**0.5, torch.randn(width, batch)
    signs, rotation = torch.randn(batch, columns), torch.randn(order, rank)
    added = torch.randn(4, order, columns)
    cores = torch.diag(torch.logspace(0, -4, order)) + 0.05 / order * added @ added.mT
    weight = torch.empty(width, width)
    # Columns that each factor is applied to: the inputs with their bias, twice the rows of a batch, and the classes.
    widths = (65, batch, batch, 10)

    def step() -> None:
        plain()
        torch.linalg.eigh(cores)
        for applied in widths:
            taken = data @ signs if columns < batch else data
            panel = torch.addmm(taken, basis, basis.mT @ taken, alpha=-1)
            _ = panel.mT @ panel
            _ = (basis @ rotation[:rank]).addmm_(panel, rotation[rank:])
            _ = basis @ (basis.mT @ data[:, :applied])
        torch.matmul(data, data.mT, out=weight)

    return step


def singd(width: int, batch: int, period: int) -> Step:
    """SINGD with dense structures, of the package ``singd``."""
    from singd.optim.optimizer import SINGD

    model, batches = data.network(width, "cpu", 0), Batches(batch)
    optimizer = SINGD(model, lr=1e-3, T=period, structures=("dense", "dense"))

    def step() -> None:
        images, labels = next(batches)
        optimizer.zero_grad()
        with _no_future_warnings():
            cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def asdfghjkl(width: int, batch: int, period: int) -> Step:
    """K-FAC with the empirical Fisher, inverses renewed periodically, of the package ``asdfghjkl``."""
    asdl = _asdl()
    model, batches = data.network(width, "cpu", 0), Batches(batch)
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
        images, labels = next(batches)
        optimizer.zero_grad()
        outputs = maker.setup_model_call(model, images)
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
