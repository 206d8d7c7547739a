"""Convolutions, ``nn.Conv1d`` to ``nn.ConvTranspose3d``: one window of the input for each position of the output."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import Kind, Uses, full_dtype


class ConvKind(Kind):
    """A convolution: d_in is the number of channels in a group times the size of a window.

    A row of inputs is a window, in the weight's order. "expand" stores all windows, one for each sample and position.
    "reduce" averages them, one dimension after another, and stores none.
    """

    types: ClassVar[tuple[type[Any], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """The groups if there are several, the output channels of a group, and the size of its windows."""
        d_out, *window = self.weight.shape
        groups = self.module.groups
        return (groups,) if groups > 1 else (), d_out // groups, math.prod(window)

    @property
    def axes(self) -> list[tuple[int, int, int]]:
        """Size, stride and dilation of the kernel in each dimension."""
        return list(zip(self.module.kernel_size, self.module.stride, self.module.dilation, strict=True))

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        batched = self.weight.ndim
        if inputs.ndim not in (batched - 1, batched) or output.ndim != inputs.ndim:
            return f"its input has {inputs.ndim} dimensions and its output {output.ndim}; a batch has {batched}"
        return ""

    def uses(self, inputs: Tensor, gradient: Tensor, *, reduce: bool = False) -> Uses:
        """Unfold the input into the windows of all positions, or to ``reduce`` into the mean window of each sample."""
        # One sample is a batch of one.
        inputs, gradient = (part if part.ndim == self.weight.ndim else part[None] for part in (inputs, gradient))
        windows, dim, groups = self.padded(inputs, gradient.shape[2:]), 2, self.module.groups
        for size, stride, dilation in self.axes:
            # `unfold` puts the window into a new last dimension. Without `reduce`, this is still a view of the input.
            windows = windows.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
            if reduce:
                windows = windows.mean(dim, dtype=full_dtype(inputs))
            else:
                dim += 1
        # (groups, samples, channels, *positions, *window), and (groups, samples, positions, channels) of outputs
        split = windows.unflatten(1, (groups, -1)).movedim(1, 0)
        gradients = gradient.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
        if reduce:
            rows = split.flatten(2).unsqueeze(2)
            gradients = gradients.sum(-2, keepdim=True, dtype=full_dtype(gradient))
        else:
            rows = split.movedim(2, dim).flatten(2, dim - 1).flatten(3)
        return Uses(rows, gradients) if groups > 1 else Uses(rows[0], gradients[0])

    def reduced(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Average the windows over the positions: (samples, 1, window)."""
        return self.uses(inputs, gradient, reduce=True)

    def padded(self, batch: Tensor, positions: torch.Size) -> Tensor:
        """Pad the input as the convolution does, for an output of these ``positions``."""
        padding, mode = self.module.padding, self.module.padding_mode
        if padding == "same":
            # If the total is odd, one more goes after the input than before it.
            totals = [dilation * (size - 1) for size, _, dilation in self.axes]
            pairs = [(total // 2, total - total // 2) for total in totals]
        else:
            pairs = [(0, 0)] * len(self.axes) if padding == "valid" else [(width, width) for width in padding]
        pads = [width for pair in reversed(pairs) for width in pair]
        return nn.functional.pad(batch, pads, mode="constant" if mode == "zeros" else mode)


class ConvTransposeKind(ConvKind):
    """A convolution by the mirrored kernel over the input with stride − 1 zeros between its values.

    So positions are those of the output, as for a convolution, and the bias is added to each.
    """

    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        d_in, d_out, *kernel = self.weight.shape
        groups = self.module.groups
        return (groups,) if groups > 1 else (), d_out, d_in // groups * math.prod(kernel)

    @property
    def axes(self) -> list[tuple[int, int, int]]:
        """Size, stride 1 and dilation of the kernel in each dimension."""
        return [(size, 1, step) for size, step in zip(self.module.kernel_size, self.module.dilation, strict=True)]

    def padded(self, batch: Tensor, positions: torch.Size) -> Tensor:
        """Spread the input by the stride, and pad it so that each position of the output has a window."""
        conv = self.module
        sizes = [(length - 1) * stride + 1 for length, stride in zip(batch.shape[2:], conv.stride, strict=True)]
        spread = batch.new_zeros(*batch.shape[:2], *sizes)
        every: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in conv.stride))
        spread[every] = batch
        pads: list[int] = []
        for (size, _, dilation), padding, length, count in zip(self.axes, conv.padding, sizes, positions, strict=True):
            before = dilation * (size - 1) - padding
            pads = [before, count + dilation * (size - 1) - before - length, *pads]
        return nn.functional.pad(spread, pads)

    def matrix(self, weight: Tensor) -> Tensor:
        """Mirror (C_in, C_out of a group, *kernel) into the convolution's (*groups, C_out of a group, window)."""
        mirrored = weight.flip(list(range(2, weight.ndim)))
        by_group: Tensor = mirrored.unflatten(0, (self.module.groups, -1))
        return by_group.transpose(1, 2).reshape(*self.shape[0], *self.shape[1:])

    def tensor(self, matrix: Tensor) -> Tensor:
        d_in, d_out, *kernel = self.weight.shape
        groups = self.module.groups
        mirrored = matrix.reshape(groups, d_out, d_in // groups, *kernel).transpose(1, 2).flatten(0, 1)
        return mirrored.flip(list(range(2, mirrored.ndim)))
