"""The tracking study: one layer's input factor, kept up to date while the network learns, beside the best possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brandla
from brandla.demo import data
from brandla.demo.data import Parts, Split
from brandla.demo.frame import Piece, Row
from brandla.demo.training import Settings, timed

UPDATES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "root_update": (brandla.LowRankRoot, brandla.root_update),
    "eigh_update": (brandla.LowRankEigh, brandla.eigh_update),
}


def piece(settings: Settings, digits: Parts) -> Piece:
    """Return the study: AdamW trains the network, and every batch updates every tracked factor."""
    # A step takes about as long as six of training; a row comes of each factor.
    steps, factors = settings.tracking_steps, len(UPDATES) * len(settings.ranks)
    key = {"seed": settings.tracking_seed}
    return Piece("tracking", key, partial(track, settings, digits), 6.0 * steps, steps * factors)


def track(settings: Settings, digits: Parts) -> Iterator[Row]:
    """Yield a row for each step and factor, and one for each time of a decomposition to compare with.

    ``trace``, ``frobenius`` and ``spectral`` are norms of M − M̂, trace norm first; those of ``best`` are of the best
    approximation of that rank, by Eckart and Young, and those of ``whole`` of M itself.
    """
    n, device, decay, seed = settings.width + 1, settings.device, settings.decay, settings.tracking_seed
    model = data.seeded(seed, data.mlp, 64, settings.width, settings.width, 10).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), settings.tracking_rate)
    truth = torch.zeros(n, n, dtype=torch.float64, device=device)
    tracked = {
        (name, rank): brandla.track(kind.zeros(n, rank, device=device))
        for rank in settings.ranks
        for name, (kind, _) in UPDATES.items()
    }
    generator = torch.Generator(device).manual_seed(seed)
    for step, batch in enumerate(data.batches(digits.training, settings.batch, settings.tracking_steps, seed), start=1):
        columns, _ = observed(model, optimizer, batch)
        truth = decay * truth + (1 - decay) * (columns.double() @ columns.double().mT)
        spectrum = torch.linalg.eigvalsh(truth).flip(0).clamp_min(0)
        for (name, rank), before in tracked.items():
            update = partial(UPDATES[name][1], before, columns, decay=decay, weight=1 - decay)
            tracked[name, rank], took = timed(update, device)
            about = {"step": step, "method": name, "rank": rank, "milliseconds": took}
            yield about | _errors(truth, spectrum, tracked[name, rank], rank)
        if step % settings.reference_every == 0:
            # Each needs the dense average, whose own update is the first.
            dense, average = truth.float(), {"beta": decay, "alpha": 1 - decay}
            calls: dict[tuple[str, int | None], Callable[[], Any]] = {
                ("dense average", None): partial(torch.addmm, dense, columns, columns.mT, **average),
                ("torch.linalg.eigh", None): partial(torch.linalg.eigh, dense),
            }
            for rank in settings.ranks:
                calls["randomized_eigh", rank] = partial(brandla.randomized_eigh, dense, rank, generator=generator)
                calls["torch.svd_lowrank", rank] = partial(torch.svd_lowrank, dense, rank + 10, niter=2)
            for (name, of_rank), call in calls.items():
                row: Row = {"step": step, "method": name, "rank": of_rank, "milliseconds": None}
                # LAPACK's float32 eigensolver is known to fail on such factors.
                with suppress(RuntimeError):
                    row["milliseconds"] = timed(call, device)[1]
                yield row


def observed(model: nn.Sequential, optimizer: torch.optim.Optimizer, batch: Split) -> tuple[Tensor, Tensor]:
    """Take a training step, and return what comes to the factors of the middle Linear, over the root of the batch k.

    These are its inputs (width + 1, k), with a last row for the bias, and the gradients of its outputs (width, k).
    """
    hidden = model[:2](batch.images)
    outputs = model[2](hidden)
    outputs.retain_grad()
    optimizer.zero_grad()
    F.cross_entropy(model[3:](outputs), batch.labels).backward()
    optimizer.step()
    root = len(hidden) ** 0.5
    inputs = torch.cat([hidden.detach(), hidden.new_ones(len(hidden), 1)], dim=1)
    # The loss is a mean: the gradient of one sample's loss is k times what backward leaves.
    return inputs.mT / root, outputs.grad.mT * root


def _errors(truth: Tensor, spectrum: Tensor, tracked: brandla.Tracked[Any], rank: int) -> Row:
    """Return the errors, the running bound and the loss of orthogonality; of a root, that of its eigenvectors."""
    factor = tracked.lowrank
    vectors = (factor if isinstance(factor, brandla.LowRankEigh) else factor.to_eigh()).eigenvectors.double()
    gram = vectors.mT @ vectors
    # ‖UᵀU − I‖₂ over the columns that are not zero.
    off = gram - torch.diag((gram.diagonal() > 0.5).to(gram.dtype))
    row: Row = {"bound": float(tracked.error_bound), "orthogonality": float(torch.linalg.eigvalsh(off).abs().max())}
    lost = torch.linalg.eigvalsh(truth - factor.dense().double())
    for of, values in (("", lost), ("best ", spectrum[rank:]), ("whole ", spectrum)):
        norms = {"trace": values.abs().sum(), "frobenius": values.norm(), "spectral": values.abs().max()}
        row |= {f"{of}{name}": float(norm) for name, norm in norms.items()}
    return row
