"""Messages between the processes of a group: tensors of any shape and dtype, packed into one buffer of bytes.

Outlines, tensors without memory, say what a buffer holds. Strides are kept: on them depends in which order a product of
matrices is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_map_only

from brandla.kfac.systems.form import tensors_of

_outline = partial(torch.empty_like, device="meta")
# Tensors start at multiples of this in a buffer, so that each can be read there.
_ALIGNMENT = 8


class Ranks:
    """The processes of a group, and where their messages are kept: a backend for GPUs sends from GPUs only."""

    def __init__(self, group: distributed.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._device = device
        self.rank = distributed.get_rank(group)
        self.world = distributed.get_world_size(group)

    def numbers(self, first: Sequence[Tensor | float], others: Sequence[int]) -> list[list[float]]:
        """Return the numbers of all processes: the first may be 0-dim tensors on the device. Waits for them."""
        known = torch.tensor(others, dtype=torch.float64, device=self._device)
        own = torch.cat([*(torch.as_tensor(one, device=self._device).double().reshape(1) for one in first), known])
        return self._gathered(own).tolist()

    def mean(self, number: Tensor) -> Tensor:
        """Return the mean over all processes of a 0-dim tensor."""
        return self._gathered(number.reshape(1).to(self._device)).mean()

    def to_all(self, own: Sequence[Tensor], outlines: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Send tensors to every process, and return those of each: contiguous, of outlines that are known to all."""
        everyone = self._gathered(self._packed([part.contiguous() for part in own], max(map(_bytes, outlines))))
        return list(map(_unpacked, everyone, outlines))

    def to_each(self, own: Sequence[Sequence[Tensor]], outlines: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Send some tensors to each process, and return those that came from each: contiguous, of known outlines."""
        sent = [self._packed([part.contiguous() for part in those]) for those in own]
        sizes = [_bytes(those) for those in outlines]
        received = self._buffer(sum(sizes))
        distributed.all_to_all_single(received, torch.cat(sent), sizes, [len(part) for part in sent], group=self._group)
        return list(map(_unpacked, received.split(sizes), outlines))

    def publish(self, own: dict[Any, Any]) -> list[dict[Any, Any]]:
        """Return the dicts of all processes: nested, of tensors, numbers and strings, with strides kept."""
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, tree_map_only(Tensor, _outline, own), group=self._group)
        buffers, pending = [], []
        for rank, each in enumerate(found):
            buffer = self._packed(tensors_of(own)) if rank == self.rank else self._buffer(_bytes(tensors_of(each)))
            buffers.append(buffer)
            if len(buffer):
                pending.append(distributed.broadcast(buffer, group=self._group, group_src=rank, async_op=True))
        for work in pending:
            work.wait()
        parts = [_unpacked(buffer, tensors_of(each)) for buffer, each in zip(buffers, found, strict=True)]
        arrived = chain(*parts)
        filled: list[dict[Any, Any]] = tree_map_only(Tensor, lambda _: next(arrived), found)
        return filled

    def _gathered(self, own: Tensor) -> Tensor:
        """Return the vectors of all processes as rows; torch 2.13 has another name for it than earlier versions."""
        everyone = own.new_empty(self.world, len(own))
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        gather(everyone.view(-1), own, group=self._group)
        return everyone

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _packed(self, tensors: Sequence[Tensor], size: int | None = None) -> Tensor:
        buffer = self._buffer(_bytes(tensors) if size is None else size)
        for view, tensor in zip(_views(buffer, list(map(_outline, tensors))), tensors, strict=True):
            view.copy_(tensor)
        return buffer


def _bytes(outline: Sequence[Tensor]) -> int:
    """Return the bytes of tensors, each up to where the next one starts."""
    return sum(-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in outline)


def _views(buffer: Tensor, outlines: Sequence[Tensor]) -> list[Tensor]:
    """View the bytes of a buffer as tensors, one after the other."""
    views, start = [], 0
    for outline in outlines:
        own = buffer[start : start + outline.nbytes].view(outline.dtype)
        views.append(own.as_strided(outline.shape, outline.stride()))
        start += _bytes([outline])
    return views


def _unpacked(buffer: Tensor, outlines: Sequence[Tensor]) -> list[Tensor]:
    """Copy the tensors out: a view would keep the buffer alive."""
    return [view.clone() for view in _views(buffer, outlines)]
