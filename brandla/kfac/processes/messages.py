"""Messages between the processes of a group: tensors of any shape and dtype, packed into one buffer of bytes.

Outlines are tensors without memory that describe a buffer's content. They keep strides, since the order in which a
matrix product is summed depends on strides.
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
# Tensors in a buffer start at multiples of this many bytes, so that views of any dtype can read them.
_ALIGNMENT = 8


class Ranks:
    """The processes of a group, and the device of their messages: a backend for GPUs sends from GPUs only."""

    def __init__(self, group: distributed.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._device = device
        self.rank = distributed.get_rank(group)
        self.world = distributed.get_world_size(group)

    def numbers(self, first: Sequence[Tensor | float], others: Sequence[int]) -> list[list[float]]:
        """Return the numbers of all processes. The ``first`` may be 0-dim tensors on the device. This waits for it."""
        tensors = [torch.as_tensor(number, device=self._device).double().reshape(1) for number in first]
        tensors.append(torch.tensor(others, dtype=torch.float64, device=self._device))
        return self._gathered(torch.cat(tensors)).tolist()

    def mean(self, number: Tensor) -> Tensor:
        """Return the mean over all processes of a 0-dim tensor."""
        return self._gathered(number.reshape(1).to(self._device)).mean()

    def all_gather(self, own: Sequence[Tensor], outlines: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Send tensors to every process; return the contiguous tensors of each, whose outlines all processes know."""
        everyone = self._gathered(self._packed([part.contiguous() for part in own], max(map(_bytes, outlines))))
        return list(map(_unpacked, everyone, outlines))

    def all_to_all(self, own: Sequence[Sequence[Tensor]], outlines: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Send some tensors to each process; return the contiguous tensors from each, whose ``outlines`` are known."""
        sent = [self._packed([part.contiguous() for part in for_rank]) for for_rank in own]
        sizes = [_bytes(from_rank) for from_rank in outlines]
        received = self._buffer(sum(sizes))
        distributed.all_to_all_single(received, torch.cat(sent), sizes, [len(part) for part in sent], group=self._group)
        return list(map(_unpacked, received.split(sizes), outlines))

    def publish(self, own: dict[Any, Any]) -> list[dict[Any, Any]]:
        """Return the nested dicts of all processes, of tensors, numbers and strings. Tensors keep their strides."""
        outlines: list[Any] = [None] * self.world
        distributed.all_gather_object(outlines, tree_map_only(Tensor, _outline, own), group=self._group)
        buffers, pending = [], []
        for rank, outline in enumerate(outlines):
            buffer = self._packed(tensors_of(own)) if rank == self.rank else self._buffer(_bytes(tensors_of(outline)))
            buffers.append(buffer)
            if len(buffer):
                pending.append(distributed.broadcast(buffer, group=self._group, group_src=rank, async_op=True))
        for work in pending:
            work.wait()
        received = chain(*(_unpacked(*pair) for pair in zip(buffers, map(tensors_of, outlines), strict=True)))
        dicts: list[dict[Any, Any]] = tree_map_only(Tensor, lambda _: next(received), outlines)
        return dicts

    def _gathered(self, own: Tensor) -> Tensor:
        """Return the vectors of all processes as rows. Torch 2.13 renames the function that gathers them."""
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
    """Return the bytes that tensors take in a buffer, with the padding after each."""
    return sum(-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in outline)


def _views(buffer: Tensor, outlines: Sequence[Tensor]) -> list[Tensor]:
    """View the bytes of a buffer as tensors, one after the other."""
    views, start = [], 0
    for outline in outlines:
        numbers = buffer[start : start + outline.nbytes].view(outline.dtype)
        views.append(numbers.as_strided(outline.shape, outline.stride()))
        start += _bytes([outline])
    return views


def _unpacked(buffer: Tensor, outlines: Sequence[Tensor]) -> list[Tensor]:
    """Copy the tensors out of a buffer, since views would keep the buffer alive."""
    return [view.clone() for view in _views(buffer, outlines)]
