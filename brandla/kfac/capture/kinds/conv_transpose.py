"""``nn.ConvTranspose1d``, ``2d`` and ``3d``: convolutions by the mirrored kernel of an input with zeros in it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.conv import ConvKind


class ConvTransposeKind(ConvKind):
    """A transposed convolution: windows are those of the input with stride − 1 zeros between its values.

    So positions are those of the output, as for a convolution, and the bias is added to each.
    """

    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @classmethod
    def left(cls, module: nn.Module) -> str:
        """Its forward pass calls nothing that a subclass could have changed."""
        return ""

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """Groups where there are several, output channels of a group, and the size of its windows."""
        d_in, d_out, *kernel = self.weight.shape
        groups = self.conv.groups
        return (groups,) if groups > 1 else (), d_out, d_in // groups * math.prod(kernel)

    @property
    def steps(self) -> list[tuple[int, int, int]]:
        """Size, stride 1 and dilation of the kernel in each dimension."""
        return [(size, 1, dilation) for size, dilation in zip(self.conv.kernel_size, self.conv.dilation, strict=True)]

    def padded(self, batch: Tensor, positions: torch.Size) -> Tensor:
        """Spread the input, and pad it so that the windows are as many as the output has positions."""
        conv = self.conv
        sizes = [(length - 1) * stride + 1 for length, stride in zip(batch.shape[2:], conv.stride, strict=True)]
        spread = batch.new_zeros(*batch.shape[:2], *sizes)
        every: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in conv.stride))
        spread[every] = batch
        pads: list[int] = []
        for (size, _, dilation), padding, length, count in zip(self.steps, conv.padding, sizes, positions, strict=True):
            before = dilation * (size - 1) - padding
            pads = [before, count + dilation * (size - 1) - before - length, *pads]
        return nn.functional.pad(spread, pads)

    def matrix(self, weight: Tensor) -> Tensor:
        """(C_in, C_out of a group, *kernel) as the convolution's (*groups, C_out of a group, window), mirrored."""
        mirrored: Tensor = weight.flip(self._kernel_dims).unflatten(0, (self.conv.groups, -1))
        return mirrored.transpose(1, 2).reshape(*self.shape[0], *self.shape[1:])

    def tensor(self, matrix: Tensor) -> Tensor:
        """Return from the convolution's weight."""
        d_in, d_out, *kernel = self.weight.shape
        groups = self.conv.groups
        by_group: Tensor = matrix.reshape(groups, d_out, d_in // groups, *kernel).transpose(1, 2)
        return by_group.flatten(0, 1).flip(self._kernel_dims)

    @property
    def _kernel_dims(self) -> list[int]:
        return list(range(2, self.weight.ndim))
