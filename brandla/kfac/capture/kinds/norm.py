"""The scale and shift of normalisations: one exact 2×2 block (1×1 without a shift) for each channel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.kind import Kind, Uses, full_dtype

_BATCH: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE: tuple[Any, ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LAST: tuple[Any, ...] = (nn.LayerNorm, nn.RMSNorm)


class NormKind(Kind):
    """A normalisation with y = w x̂ + b in each channel: groups are the channels.

    In every sharing, a row is (∂w, ∂b) of one sample, summed over its positions. So the block of a channel is the mean
    of its gradients' outer products, with no approximation.
    """

    types = (*_BATCH, *_INSTANCE, *_LAST, nn.GroupNorm)
    single = True
    # The running mean and variance, for a call that uses them.
    _fixed: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, module: nn.Module, weight: str = "weight", bias: str = "bias") -> None:
        super().__init__(module, weight, bias)
        # True if the channels are the last dimensions.
        self.either_order = self.either_order or isinstance(module, _LAST)

    @classmethod
    def of(cls, module: nn.Module) -> list[Kind] | str | None:
        if isinstance(module, nn.SyncBatchNorm):
            return "its statistics come from several processes"
        if isinstance(module, cls.types) and module.weight is None:
            return []
        return super().of(module)

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """Channels, of one weight each."""
        return (self.weight.numel(),), 1, 1

    def misfit(self, inputs: Tensor, output: Tensor) -> str:
        """Return a reason if the input is not a batch: instance normalisations take a single sample too."""
        if output.shape != inputs.shape:
            return f"its output has shape {tuple(output.shape)}, its input {tuple(inputs.shape)}"
        if any(isinstance(self.module, kind) and inputs.ndim < 3 + index for index, kind in enumerate(_INSTANCE)):
            return f"its input of shape {tuple(inputs.shape)} is not a batch"
        return ""

    def of_call(self) -> Kind:
        """Return a kind that keeps the running statistics, if the module uses them now."""
        if self.module.training or getattr(self.module, "running_mean", None) is None:
            return self
        return self.copy_with(_fixed={name: part.clone() for name, part in self.module._buffers.items()})

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return (channels, samples, 1, 2): the gradients of scale and shift of each sample."""
        gradient = gradient.to(full_dtype(gradient))
        products = self._by_channel(gradient * self._normalised(inputs.to(gradient.dtype)))
        parts = [products] if self.bias is None else [products, self._by_channel(gradient)]
        samples, channels, _ = products.shape
        rows = products.new_empty(channels, samples, 1, len(parts))
        for index, part in enumerate(parts):
            torch.sum(part, -1, out=rows[:, :, 0, index].mT)
        return Uses(rows, rows)

    def _normalised(self, inputs: Tensor) -> Tensor:
        """Run the module without scale and shift, with the call's running statistics or else those of the inputs."""
        plain: Any = self.module.__new__(type(self.module))
        parameters, buffers = dict.fromkeys(self.module._parameters), dict.fromkeys(self.module._buffers) | self._fixed
        vars(plain).update(vars(self.module), _parameters=parameters, _buffers=buffers, training=not self._fixed)
        output: Tensor = type(plain).forward(plain, inputs)
        return output

    def _by_channel(self, part: Tensor) -> Tensor:
        """Reshape to (samples, channels, positions)."""
        channels = self.weight.numel()
        if not self.either_order:
            return part.reshape(part.shape[0], channels, -1)
        samples = part.shape[0] if part.ndim > self.weight.ndim else 1
        return part.reshape(samples, -1, channels).mT
