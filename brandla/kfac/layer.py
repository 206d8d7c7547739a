"""One weight under K-FAC: its calls as rows, its gradient as a matrix, and the step written back."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from brandla.kfac.capture import Call, Capture, Pass, Recorder
from brandla.kfac.kinds import Kind, Uses
from brandla.kfac.strategy import Curvature, Gradient, Rows, Shape, Strategy

Sharing = Literal["expand", "reduce"]


class Layer:
    """A weight and its bias, as a matrix (*groups, d_out, d_in) with the bias as its last column."""

    def __init__(self, name: str, kind: Kind, strategy: Strategy, sharing: Sharing, recorder: Recorder) -> None:
        self.name = name
        self.kind = kind
        self.strategy = strategy
        self.sharing = sharing
        self.has_bias = kind.bias is not None
        self.capture = Capture(kind, recorder)
        self.curvature: Curvature = strategy.curvature(self.shape)
        # Whether the gradient is the sum of the captured pairs: None until looked at, once.
        self.linear: bool | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Precision of factors and of the step: that of the weight, but at least float32."""
        return torch.promote_types(self.kind.weight.dtype, torch.float32)

    @property
    def shape(self) -> Shape:
        """Of the weight and its bias as a matrix."""
        groups, d_out, d_in = self.kind.shape
        device = self.kind.weight.device
        return Shape(groups, d_out, d_in + self.has_bias, self.dtype, device, self.kind.one_hot, self.kind.single)

    @property
    def has_gradient(self) -> bool:
        """Whether there is anything to precondition."""
        return self.kind.weight.grad is not None

    def rows(self, of: Pass, scale: Tensor | None) -> Rows | None:
        """Return the rows of the captured calls as the sharing has them, γ divided by the loss's ``scale``."""
        calls = [call for call in self.capture.calls if call.gradients[of]]
        if not calls:
            return None
        return self._stacked(calls, of, scale, reduce=self.sharing == "reduce")

    def pair(self, rows: Rows | None) -> tuple[Tensor, Tensor] | None:
        """Return (P, Q) with gradient P Qᵀ where it is cheaper to apply than the gradient, and is all of it.

        ``rows`` are those of the loss's own gradients, where they were stacked already.
        """
        rank = self.curvature.rank()
        if self.linear is False or rank is None or self.kind.one_hot or self.kind.single:
            return None
        calls = [call for call in self.capture.calls if call.gradients["loss"]]
        if not calls or not self.capture.gradient_is_pairs():
            return None
        if rows is None or self.sharing == "reduce":
            rows = self._stacked(calls, "loss", None, reduce=False)
        if rows.uses > 2 * rank:
            return None
        pair = rows.gradients.mT, rows.inputs.mT
        if self.linear is None:
            self.linear = self._is_gradient(*pair)
        return pair if self.linear else None

    def gradient(self) -> Tensor:
        """Return the gradient as a matrix."""
        weight = self.kind.weight.grad
        assert weight is not None
        matrix = self.kind.matrix(weight.to(self.dtype))
        if not self.has_bias:
            return matrix
        return torch.cat([matrix, self._bias_column(matrix)], dim=-1)

    def write(self, step: Gradient, factor: Tensor | float) -> None:
        """Overwrite the gradient with ``factor`` times the step."""
        weight, bias = self.kind.weight.grad, self.kind.bias
        assert weight is not None
        d_in = self.kind.shape[2]
        if isinstance(step, Tensor):
            matrix, column = step[..., :d_in] * factor, step[..., -1:] * factor
        else:
            first, second = step[0] * factor, step[1]
            if self._writes_directly(weight):
                torch.mm(first, second[:d_in].mT, out=weight)
                matrix = None
            else:
                matrix = first @ second[..., :d_in, :].mT
            column = first @ second[..., -1:, :].mT
        if matrix is not None:
            weight.copy_(matrix.reshape(weight.shape))
        if self.has_bias and bias is not None and bias.grad is not None:
            bias.grad.copy_(column.reshape(bias.shape))

    def _writes_directly(self, weight: Tensor) -> bool:
        return weight.ndim == 2 and not self.kind.shape[0] and weight.dtype == self.dtype

    def _bias_column(self, matrix: Tensor) -> Tensor:
        bias = self.kind.bias
        if bias is None or bias.grad is None:
            return matrix.new_zeros(*matrix.shape[:-1], 1)
        return bias.grad.to(self.dtype).reshape(*matrix.shape[:-1], 1)

    def _stacked(self, calls: list[Call], of: Pass, scale: Tensor | None, *, reduce: bool) -> Rows:
        """One row for every sample and position, in the factors' dtype; draws repeat the gradients alone."""
        inputs, gradients, positions = [], [], set()
        count = 0
        for call in calls:
            for index, gradient in enumerate(call.gradients[of]):
                uses = self.kind.uses(call.inputs, gradient)
                uses = _reduced(uses) if reduce and not self.kind.one_hot else uses
                samples = uses.gradients.shape[-3]
                positions.add(uses.gradients.shape[-2])
                gradients.append(uses.gradients.flatten(-3, -2))
                if of == "loss" or index == 0 or self.kind.single:
                    inputs.append(uses.inputs.flatten(-3, -2) if not self.kind.one_hot else uses.inputs.flatten())
                if of == "loss" or index == 0:
                    count += samples * uses.gradients.shape[-2]
        return Rows(
            self._with_one(_joined(inputs, -2)),
            self._unscaled(_joined(gradients, -2).to(self.dtype), scale),
            count,
            positions.pop() if len(positions) == 1 else 1,
        )

    def _with_one(self, inputs: Tensor) -> Tensor:
        """Append the 1 of the bias, in the factors' dtype; indices and whole gradients stay."""
        if self.kind.one_hot:
            return inputs
        inputs = inputs.to(self.dtype)
        if self.kind.single or not self.has_bias:
            return inputs
        return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)

    def _unscaled(self, gradients: Tensor, scale: Tensor | None) -> Tensor:
        return gradients if scale is None else gradients / scale

    def _is_gradient(self, first: Tensor, second: Tensor) -> bool:
        """Compare P Qᵀ with the gradient, once in a layer's life: a weight used elsewhere in the loss shows here."""
        difference = torch.linalg.vector_norm(first @ second.mT - self.gradient())
        call = self.capture.calls[0]
        eps = max(torch.finfo(part.dtype).eps for part in (call.inputs, call.gradients["loss"][0], self.kind.weight))
        bound = 8 * eps * torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
        return bool(difference <= bound)


def _reduced(uses: Uses) -> Uses:
    """Average inputs and sum gradients over positions."""
    return Uses(uses.inputs.mean(-2, keepdim=True), uses.gradients.sum(-2, keepdim=True))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=0 if parts[0].ndim == 1 else dim)
