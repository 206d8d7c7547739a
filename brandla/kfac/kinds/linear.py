"""``nn.Linear``, with any dimensions between samples and features."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from brandla.kfac.kinds.kind import Kind, Uses, is_ready


class LinearKind(Kind):
    """A Linear: rows are samples and the positions between the first and the last dimension."""

    @classmethod
    def of(cls, module: nn.Module) -> Iterable[Kind]:
        """Return the weight of a Linear."""
        # MultiheadAttention reads the weight of its output projection without calling it.
        projection = isinstance(module, NonDynamicallyQuantizableLinear)
        if isinstance(module, nn.Linear) and not projection and is_ready(module.weight):
            yield cls(module)

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """d_out and d_in."""
        d_out, d_in = self.weight.shape
        return (), d_out, d_in

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return samples, positions and features."""
        return Uses(_by_sample(inputs), _by_sample(gradient))


def _by_sample(part: Tensor) -> Tensor:
    """Reshape (samples, *positions, d) to (samples, positions, d); a single vector is one sample."""
    if part.ndim <= 2:
        return part.reshape(-1, 1, part.shape[-1])
    return part.reshape(part.shape[0], -1, part.shape[-1])
