"""The training run that the factors come from: an MLP on digits, whose middle layer is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.accuracy.settings import Settings
from brandla.demo import data


class Observation(NamedTuple):
    """One step of the middle Linear: the columns that come to either factor, and the gradient of its weights."""

    step: int
    columns: dict[str, Tensor]  # "inputs" (width + 1, k) with the bias' ones last, "gradients" (width, k), over √k
    gradient: Tensor  # (width, width + 1)


def observations(settings: Settings, width: int, seed: int) -> Iterator[Observation]:
    """Train 64-width-width-10 with AdamW, and yield what every step shows."""
    model = data.network(width, "cpu", seed)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate)
    stream = data.batches(data.load("cpu").training, settings.batch, settings.steps, seed)
    for step, batch in enumerate(stream, start=1):
        hidden = model[:2](batch.images)
        outputs = model[2](hidden)
        outputs.retain_grad()
        optimizer.zero_grad()
        F.cross_entropy(model[3:](outputs), batch.labels).backward()
        optimizer.step()
        k = len(batch.labels)
        inputs = torch.cat([hidden.detach(), hidden.new_ones(k, 1)], dim=1)
        # The loss is a mean: the gradient of one sample's loss is k times what backward leaves.
        columns = {"inputs": inputs.mT / k**0.5, "gradients": outputs.grad.mT * k**0.5}
        yield Observation(step, columns, (columns["gradients"] @ columns["inputs"].mT))
