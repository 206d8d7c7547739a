"""The tracking study: one layer's input factor, kept up to date while the network learns, beside the best possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brandla
from brandla.demo import data
from brandla.demo.data import Parts, Split
from brandla.demo.frame import Piece, Row, Tick
from brandla.demo.settings import Settings
from brandla.demo.training import timed

Update = Callable[..., Any]
UPDATES: dict[str, tuple[Any, Update]] = {
    "root_update": (brandla.LowRankRoot, brandla.root_update),
    "eigh_update": (brandla.LowRankEigh, brandla.eigh_update),
}
# Cost of a step for the progress bar; about milliseconds.
STEP_COST = 100.0


def piece(settings: Settings, digits: Parts) -> Piece:
    """Return the study: AdamW trains the network, and every batch updates every tracked factor."""
    key = {"seed": settings.tracking_seed}
    return Piece("tracking", key, STEP_COST * settings.tracking_steps, lambda _, tick: track(settings, digits, tick))


def track(settings: Settings, digits: Parts, tick: Tick) -> Iterator[Row]:
    """Yield a row for each step and factor, and one for each time of a decomposition to compare with.

    ``trace``, ``frobenius`` and ``spectral`` are norms of M − M̂, trace norm first; those of ``best`` are of the best
    approximation of that rank, by Eckart and Young, and those of ``whole`` of M itself.
    """
    model = data.network(settings.width, settings.device, settings.tracking_seed)
    optimizer = torch.optim.AdamW(model.parameters(), settings.tracking_rate)
    n, device, decay = settings.order, settings.device, settings.decay
    truth = torch.zeros(n, n, dtype=torch.float64, device=device)
    tracked = {
        (name, rank): brandla.track(kind.zeros(n, rank, device=device))
        for rank in settings.ranks
        for name, (kind, _) in UPDATES.items()
    }
    references = list(_references(settings))
    stream = data.batches(digits.training, settings.batch, settings.tracking_steps, settings.tracking_seed)
    for step, batch in enumerate(stream, start=1):
        columns = _columns(model, optimizer, batch)
        truth = decay * truth + (1 - decay) * (columns.double() @ columns.double().mT)
        spectrum = torch.linalg.eigvalsh(truth).flip(0).clamp_min(0)
        for (name, rank), before in tracked.items():
            update = UPDATES[name][1]
            after, took = timed(lambda: update(before, columns, decay=decay, weight=1 - decay), device)  # noqa: B023
            tracked[name, rank] = after
            about = {"step": step, "method": name, "rank": rank, "milliseconds": took}
            yield about | _errors(truth, spectrum, after, rank)
        if step % settings.reference_every == 0:
            for name, rank_, call in references:
                took_: float | None = None
                try:
                    _, took_ = timed(lambda: call(truth.float(), columns), device)  # noqa: B023
                except RuntimeError:
                    # LAPACK's float32 eigensolver is known to fail on such factors.
                    took_ = None
                yield {"step": step, "method": name, "rank": rank_, "milliseconds": took_}
        tick(1 / settings.tracking_steps)


def _columns(model: nn.Sequential, optimizer: torch.optim.Optimizer, batch: Split) -> Tensor:
    """Take a training step and return the second Linear's scaled inputs, A (n, k), with a last row for the bias."""
    hidden = model[:2](batch.images)
    optimizer.zero_grad()
    F.cross_entropy(model[2:](hidden), batch.labels).backward()
    optimizer.step()
    inputs = torch.cat([hidden.detach(), hidden.new_ones(len(hidden), 1)], dim=1)
    columns: Tensor = inputs.mT / len(hidden) ** 0.5
    return columns


def _errors(truth: Tensor, spectrum: Tensor, tracked: brandla.Tracked[Any], rank: int) -> Row:
    """Return the errors, the running bound and the loss of orthogonality; of a root, that of its eigenvectors."""
    factor = tracked.lowrank
    vectors = (factor if isinstance(factor, brandla.LowRankEigh) else factor.to_eigh()).eigenvectors.double()
    gram = vectors.mT @ vectors
    # ‖UᵀU − I‖₂ over the columns that are not zero.
    off = gram - torch.diag((gram.diagonal() > 0.5).to(gram.dtype))
    return {
        **_norms("", torch.linalg.eigvalsh(truth - factor.dense().double())),
        **_norms("best ", spectrum[rank:]),
        **_norms("whole ", spectrum),
        "bound": float(tracked.error_bound),
        "orthogonality": float(torch.linalg.eigvalsh(off).abs().max()),
    }


def _norms(of: str, eigenvalues: Tensor) -> Row:
    sizes = eigenvalues.abs()
    values = {"trace": sizes.sum(), "frobenius": sizes.norm(), "spectral": sizes.max()}
    return {f"{of}{name}": float(value) for name, value in values.items()}


def _references(settings: Settings) -> Iterator[tuple[str, int | None, Callable[[Tensor, Tensor], object]]]:
    """Yield what is timed beside the updates: each needs the dense average, whose own update is the first."""
    decay = settings.decay
    generator = torch.Generator(settings.device).manual_seed(settings.tracking_seed)
    yield "dense average", None, lambda dense, new: torch.addmm(dense, new, new.mT, beta=decay, alpha=1 - decay)
    yield "torch.linalg.eigh", None, lambda dense, _: torch.linalg.eigh(dense)
    for rank in settings.ranks:
        yield "randomized_eigh", rank, partial(_randomized, rank=rank, generator=generator)
        yield "torch.svd_lowrank", rank, partial(_svd_lowrank, rank=rank)


def _randomized(dense: Tensor, _: Tensor, rank: int, generator: torch.Generator) -> object:
    return brandla.randomized_eigh(dense, rank, generator=generator)


def _svd_lowrank(dense: Tensor, _: Tensor, rank: int) -> object:
    return torch.svd_lowrank(dense, rank + 10, niter=2)
