"""``nn.Linear``, with any dimensions between samples and features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from brandla.kfac.capture.kinds.kind import Kind, Uses, by_sample, is_called_as, why_left


class LinearKind(Kind):
    """A Linear: rows are samples and the positions between the first and the last dimension."""

    leaves_out = True

    @classmethod
    def of(cls, module: nn.Module) -> list[Kind] | str | None:
        """Return the weight of a Linear."""
        if not isinstance(module, nn.Linear):
            return None
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "the attention that holds it never calls it"
        if not is_called_as(module, nn.Linear):
            return f"{type(module).__name__} has a forward pass of its own"
        return why_left(module, "weight") or [cls(module)]

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """d_out and d_in."""
        d_out, d_in = self.weight.shape
        return (), d_out, d_in

    def refusal(self, inputs: object, output: object) -> str:
        """Say so where the last dimensions are not those of the weight."""
        if reason := super().refusal(inputs, output):
            return reason
        assert isinstance(inputs, Tensor)
        assert isinstance(output, Tensor)
        wanted = (*inputs.shape[:-1], self.weight.shape[0])
        if output.shape != wanted:
            return f"its output has shape {tuple(output.shape)}, where the input makes {wanted}"
        return ""

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Return samples, positions and features."""
        return Uses(by_sample(inputs), by_sample(gradient))
