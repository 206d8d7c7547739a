"""Messages between the processes of a group: tensors of any shape and dtype, packed into one buffer of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

# Tensors start at multiples of this in a buffer, so that each can be read there.
_ALIGNMENT = 8


class Layout(NamedTuple):
    """Of a tensor in a message. Strides are kept: on them depends in which order a product of matrices is summed."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Return the layout that a copy of the tensor has."""
        return cls(tuple(tensor.shape), torch.empty_like(tensor, device="meta").stride(), tensor.dtype)

    @property
    def bytes(self) -> int:
        """Bytes up to where the next tensor starts."""
        count = torch.Size(self.shape).numel() * self.dtype.itemsize
        return -(-count // _ALIGNMENT) * _ALIGNMENT

    def within(self, buffer: Tensor, start: int) -> Tensor:
        """View the bytes of a buffer from ``start`` on as a tensor of this layout."""
        count = torch.Size(self.shape).numel() * self.dtype.itemsize
        return buffer[start : start + count].view(self.dtype).as_strided(self.shape, self.stride)


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

    def to_all(self, own: Sequence[Tensor], layouts: Sequence[Sequence[Layout]]) -> list[list[Tensor]]:
        """Send tensors to every process, and return those of each: contiguous, of layouts that are known to all."""
        everyone = self._gathered(self._packed([part.contiguous() for part in own], max(map(_bytes, layouts))))
        return [_unpacked(part, those) for part, those in zip(everyone, layouts, strict=True)]

    def to_each(self, own: Sequence[Sequence[Tensor]], layouts: Sequence[Sequence[Layout]]) -> list[list[Tensor]]:
        """Send some tensors to each process, and return those that came from each: contiguous, of known layouts."""
        sent = [self._packed([part.contiguous() for part in those]) for those in own]
        sizes = [_bytes(those) for those in layouts]
        received = self._buffer(sum(sizes))
        distributed.all_to_all_single(received, torch.cat(sent), sizes, [len(part) for part in sent], group=self._group)
        return [_unpacked(part, those) for part, those in zip(received.split(sizes), layouts, strict=True)]

    def publish(self, own: dict[Any, Any]) -> list[dict[Any, Any]]:
        """Return the dicts of all processes: nested, of tensors, numbers and strings, with strides kept."""
        tensors = [part for part in tree_leaves(own) if isinstance(part, Tensor)]
        outlines: list[Any] = [None] * self.world
        distributed.all_gather_object(outlines, tree_map_only(Tensor, Layout.of, own), group=self._group)
        layouts = [[part for part in tree_leaves(each, _is_layout) if _is_layout(part)] for each in outlines]
        buffers = [
            self._packed(tensors) if rank == self.rank else self._buffer(_bytes(those))
            for rank, those in enumerate(layouts)
        ]
        pending = [
            distributed.broadcast(buffer, group=self._group, group_src=rank, async_op=True)
            for rank, buffer in enumerate(buffers)
            if len(buffer)
        ]
        for work in pending:
            work.wait()
        # Tensors take the place of their layouts.
        waiting = [iter(_unpacked(buffer, those)) for buffer, those in zip(buffers, layouts, strict=True)]
        return [
            tree_map(lambda part, own=own: next(own) if _is_layout(part) else part, each, is_leaf=_is_layout)
            for each, own in zip(outlines, waiting, strict=True)
        ]

    def _gathered(self, own: Tensor) -> Tensor:
        """Return the vectors of all processes as rows; torch 2.13 has another name for it than earlier versions."""
        everyone = own.new_empty(self.world, len(own))
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        gather(everyone.view(-1), own, group=self._group)
        return everyone

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _packed(self, tensors: Sequence[Tensor], size: int | None = None) -> Tensor:
        layouts = [Layout.of(tensor) for tensor in tensors]
        buffer = self._buffer(_bytes(layouts) if size is None else size)
        start = 0
        for tensor, layout in zip(tensors, layouts, strict=True):
            layout.within(buffer, start).copy_(tensor)
            start += layout.bytes
        return buffer


def _bytes(layouts: Sequence[Layout]) -> int:
    return sum(layout.bytes for layout in layouts)


def _unpacked(buffer: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
    """Copy the tensors out: a view would keep the buffer alive."""
    tensors, start = [], 0
    for layout in layouts:
        tensors.append(layout.within(buffer, start).clone())
        start += layout.bytes
    return tensors


def _is_layout(part: object) -> bool:
    return isinstance(part, Layout)
