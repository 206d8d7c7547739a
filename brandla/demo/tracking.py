"""The tracking study: one layer's input factor, kept up to date while the network learns, beside the best possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brandla
from brandla.demo import data
from brandla.demo.data import Digits, Split
from brandla.demo.meter import Meter
from brandla.demo.results import Errors, Reference, Tracker, Tracking
from brandla.demo.settings import Settings
from brandla.demo.timing import timed

# Relative cost of one step, for the progress bar; about milliseconds.
STEP_COST = 100.0


def track(settings: Settings, digits: Digits, study: Tracking, meter: Meter) -> None:
    """Fill ``study``: AdamW trains the network, and every batch updates every tracked factor."""
    options = settings.tracking
    model = data.network(settings.width, settings.device, options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    observer = _Observer(settings, study)
    stream = data.batches(digits.training, settings.batch, options.steps, options.seed)
    for step, batch in enumerate(stream, start=1):
        observer.observe(step, _train(model, optimizer, batch))
        meter.advance(STEP_COST)


def order(settings: Settings) -> int:
    """Order n of the tracked factor: the layer's inputs, and 1 for the bias."""
    return settings.width + 1


def _train(model: nn.Sequential, optimizer: torch.optim.Optimizer, batch: Split) -> Tensor:
    """Take a training step and return the second Linear's scaled inputs, A (n, k), with a last row for the bias."""
    hidden = model[:2](batch.images)
    optimizer.zero_grad()
    F.cross_entropy(model[2:](hidden), batch.labels).backward()
    optimizer.step()
    inputs = torch.cat([hidden.detach(), hidden.new_ones(len(hidden), 1)], dim=1)
    columns: Tensor = inputs.mT / len(hidden) ** 0.5
    return columns


class _Observer:
    """Holds the dense truth and the tracked factors, and writes down how far apart they are."""

    def __init__(self, settings: Settings, study: Tracking) -> None:
        self._settings = settings
        self._study = study
        n, device = order(settings), settings.device
        self._truth = torch.zeros(n, n, dtype=torch.float64, device=device)
        self._streams: list[_Stream] = []
        for rank in settings.tracking.ranks:
            study.best[rank] = Errors()
            self._add("root_update", rank, brandla.LowRankRoot.zeros(n, rank, device=device), brandla.root_update)
            self._add("eigh_update", rank, brandla.LowRankEigh.zeros(n, rank, device=device), brandla.eigh_update)
        self._references = [_Timed(reference, call) for reference, call in _references(settings)]
        study.references.extend(reference.record for reference in self._references)

    def observe(self, step: int, columns: Tensor) -> None:
        """Take in the columns of a step and measure."""
        settings, study = self._settings, self._study
        decay = settings.decay
        wide = columns.double()
        self._truth = decay * self._truth + (1 - decay) * (wide @ wide.mT)
        for stream in self._streams:
            stream.update(columns, settings)
        self._note_truth()
        for stream in self._streams:
            stream.measure(self._truth)
        study.steps.append(step)
        if step % settings.tracking.reference_every == 0:
            dense = self._truth.float()
            for reference in self._references:
                reference.time(dense, columns, settings.device)

    def _add(
        self, name: str, rank: int, start: brandla.LowRankEigh | brandla.LowRankRoot, update: Callable[..., Any]
    ) -> None:
        record = Tracker(name, rank)
        self._study.trackers.append(record)
        self._streams.append(_Stream(record, brandla.track(start), update))

    def _note_truth(self) -> None:
        """Note the norms of M and, by Eckart–Young, of the best rank-r error: those of the trailing eigenvalues."""
        spectrum = torch.linalg.eigvalsh(self._truth).flip(0).clamp_min(0)
        _note(self._study.norms, spectrum)
        for rank, best in self._study.best.items():
            _note(best, spectrum[rank:])


class _Stream:
    """One factor under one update."""

    def __init__(self, record: Tracker, tracked: brandla.Tracked[Any], update: Callable[..., Any]) -> None:
        self._record = record
        self._tracked = tracked
        self._update = update

    def update(self, columns: Tensor, settings: Settings) -> None:
        """Update the factor, and note the time."""
        decay = settings.decay
        self._tracked, milliseconds = timed(
            lambda: self._update(self._tracked, columns, decay=decay, weight=1 - decay), settings.device
        )
        self._record.milliseconds.append(milliseconds)

    def measure(self, truth: Tensor) -> None:
        """Note the errors, the running bound and the loss of orthogonality; of a root, that of its eigenvectors."""
        record, (factor, bound, _) = self._record, self._tracked
        _note(record.errors, torch.linalg.eigvalsh(truth - factor.dense().double()))
        record.bound.append(float(bound))
        eigh = factor if isinstance(factor, brandla.LowRankEigh) else factor.to_eigh()
        record.orthogonality.append(_orthogonality_loss(eigh.eigenvectors))


def _note(errors: Errors, eigenvalues: Tensor) -> None:
    sizes = eigenvalues.abs()
    errors.trace.append(float(sizes.sum()))
    errors.frobenius.append(float(sizes.norm()))
    errors.spectral.append(float(sizes.max()))


def _orthogonality_loss(basis: Tensor) -> float:
    """‖UᵀU − I‖₂ over the columns that are not zero."""
    wide = basis.double()
    gram = wide.mT @ wide
    occupied = (gram.diagonal() > 0.5).to(gram.dtype)
    return float(torch.linalg.eigvalsh(gram - torch.diag(occupied)).abs().max())


class _Timed(NamedTuple):
    """A computation on the dense average (n, n) and the new columns (n, k), and where its times go."""

    record: Reference
    call: Callable[[Tensor, Tensor], object]

    def time(self, dense: Tensor, columns: Tensor, device: str) -> None:
        """Run it once; LAPACK's float32 eigensolver is known to fail on such factors, which is counted."""
        try:
            _, milliseconds = timed(lambda: self.call(dense, columns), device)
        except RuntimeError:
            self.record.failures += 1
        else:
            self.record.milliseconds.append(milliseconds)


def _references(settings: Settings) -> list[tuple[Reference, Callable[[Tensor, Tensor], object]]]:
    """List what is timed beside the updates: each needs the dense average, whose own update is the first."""
    decay = settings.decay
    generator = torch.Generator(settings.device).manual_seed(settings.tracking.seed)

    def average(dense: Tensor, columns: Tensor) -> Tensor:
        return torch.addmm(dense, columns, columns.mT, beta=decay, alpha=1 - decay)

    def full(dense: Tensor, columns: Tensor) -> object:
        return torch.linalg.eigh(dense)

    def randomized(rank: int) -> Callable[[Tensor, Tensor], object]:
        return lambda dense, columns: brandla.randomized_eigh(dense, rank, generator=generator)

    def lowrank(rank: int) -> Callable[[Tensor, Tensor], object]:
        return lambda dense, columns: torch.svd_lowrank(dense, rank + 10, niter=2)

    calls: list[tuple[Reference, Callable[[Tensor, Tensor], object]]] = [
        (Reference("dense average", None), average),
        (Reference("torch.linalg.eigh", None), full),
    ]
    for rank in settings.tracking.ranks:
        calls.append((Reference("randomized_eigh", rank), randomized(rank)))
        calls.append((Reference("torch.svd_lowrank", rank), lowrank(rank)))
    return calls
