"""One weight under K-FAC: its calls as rows, its gradient as a matrix, and the step written back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from brandla._sharded import gathered
from brandla.kfac.capture.calls import Call, Pass, Recorder, averaged
from brandla.kfac.capture.hooks import Capture
from brandla.kfac.capture.kinds.kind import Kind, Uses
from brandla.kfac.systems.strategy import Curvature, Strategy
from brandla.kfac.values import Gradient, Rows, Shape, Version, by_kind

Sharing = Literal["expand", "reduce"]


@dataclass(eq=False)
class StepPart:
    """Part of a step, and the gradient that it replaces: the same tensor once the step has been written."""

    step: Tensor
    gradient: Tensor

    def split(self, count: int) -> list[StepPart]:
        """Return the parts of ``count`` weights that lie one after the other."""
        steps = self.step.chunk(count)
        gradients = steps if self.step is self.gradient else self.gradient.chunk(count)
        return list(map(StepPart, steps, gradients))


class Layer:
    """A weight and its bias, as a matrix (*groups, d_out, d_in) with the bias as its last column."""

    def __init__(self, kind: Kind, strategy: Strategy, sharing: Sharing, recorder: Recorder) -> None:
        self.name = kind.name
        self.kind = kind
        self.strategy = strategy
        self.sharing = sharing
        # Whether inputs are (samples, positions, ...) or (positions, samples, ...), and a description of the order.
        self.batch_first, self.order = True, ""
        self.has_bias = kind.bias is not None
        self.capture = Capture(kind, recorder)
        # The shape of the weight and its bias as a matrix, for which the curvature is made. The curvature of a frozen
        # weight takes no memory: it is made anew when the weight thaws.
        self.shape = self._shape_now()
        if self.is_frozen:
            self.shape = self.shape._replace(device=torch.device("meta"))
        # The weight's shape, dtype, device and order when `match_weight` last looked.
        self._layout: tuple[Any, ...] = ()
        self.curvature: Curvature = strategy.curvature(self.shape)
        # Whether the gradient is the sum of the captured pairs: None until `pair` has checked once.
        self.gradient_is_pair: bool | None = None if kind.pairs else False
        # Whether some module uses the transposed weight.
        self.has_transposed_use = False
        # The weight and its trained bias, during a step.
        self.weight: Any = None
        self.bias: nn.Parameter | None = None
        # The rows whose product is the gradient, while the gradient is empty memory.
        self.unformed: Rows | None = None
        # The calls of this step whose pair is applied, once `_pair_calls` has found them.
        self._paired: list[Call] = []
        # The gradient as the last step wrote it.
        self._written: Version | None = None
        # Unit vectors (*groups, d_in) that attain the last step's spectral norm, if the clip is spectral.
        self.direction: Tensor | None = None

    def begin(self) -> None:
        """Find the weight and the bias for a step: a sharded weight may be another tensor in each step."""
        self.weight, self.bias = self.kind.weight, self.kind.bias
        self.unformed, self._paired = None, []
        self.capture.forget_unaccumulated()

    def end(self) -> int:
        """Forget what was captured for a step, and return its bytes."""
        self.weight = self.bias = None
        return self.capture.clear()

    @property
    def bias_gradient(self) -> Tensor | None:
        """The part of the bias's gradient that belongs to this weight, to be written to."""
        if self.bias is None or self.bias.grad is None:
            return None
        return self.kind.bias_part(self.bias.grad)

    @property
    def has_gradient(self) -> bool:
        """Whether there is a gradient to precondition: somebody has written to it since the last step."""
        if self.capture.left_out and self._calls_left_out():
            return True
        gradient: Tensor | None = self.weight.grad
        return gradient is not None and not (self._written is not None and self._written.matches(gradient))

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is not trained, and has no gradient left from an earlier training."""
        weight = self.kind.weight
        return not weight.requires_grad and weight.grad is None

    @property
    def is_unseen(self) -> bool:
        """Whether the capture was on, and there is still no data at all to precondition the gradient with."""
        has_no_calls = bool(self.capture.passes) and not self.capture.calls
        return has_no_calls and not (self.curvature.started or self.kind.was_seen)

    def match_weight(self, *, thaws: bool = False) -> None:
        """Move the curvature to the weight's current dtype and device, or start anew if the weight has another size.

        The curvature of a frozen weight stays as it is, unless it ``thaws``.
        """
        weight = self.kind.weight if self.weight is None else self.weight
        layout = weight.shape, weight.dtype, weight.device, self.kind.transposed
        if layout == self._layout or (self.is_frozen and not thaws):
            return
        self._layout = layout
        shape, old_shape = self._shape_now(), self.shape
        if shape != old_shape:
            self.shape = shape
            continues = self.curvature.started and shape[:3] == old_shape[:3]
            fresh = self.strategy.curvature(shape)
            self.curvature = fresh.loaded(self.curvature.state_dict(), self.name) if continues else fresh

    def attach(self, kind: Kind) -> None:
        """Watch another module that uses the weight. If it uses the transpose, the gradient is not a single pair."""
        self.capture.attach(kind)
        if kind.uses_transpose:
            self.has_transposed_use, self.gradient_is_pair = True, False

    def rows(self, pass_name: Pass, scale: Tensor | None) -> Rows | None:
        """Return the rows of the captured calls in this layer's sharing, with γ divided by the loss's ``scale``."""
        calls = self._calls(pass_name)
        return self._rows_of_calls(calls, pass_name, scale) if calls else None

    def take_gradient(self, rows: Rows | None, scale: Tensor | None) -> Rows | None:
        """Return the rows whose product is the gradient that autograd has left out; None if it has formed all of it.

        The gradient is empty memory until `gradient` fills it. If autograd has formed another part of the gradient, the
        product is added at once. If the gradient may hold more than the captured calls, this raises.
        """
        calls = self._calls_left_out()
        if not calls:
            return None
        if not self.capture.gradient_is_captured():
            message = (
                f"KFAC.step: gradient='pair': the gradient of {self.name}.weight must come from the calls since the"
                " last step alone, but its bias's gradient was set before or has been written to; call zero_grad()"
                " with set_to_none=True after each step, change no gradient before it, or choose gradient='autograd'"
            )
            raise RuntimeError(message)
        rows = self._loss_rows(rows if len(calls) == len(self._calls("loss")) else None, calls, scale)
        if self.weight.grad is None:
            self.weight.grad = torch.empty_like(self.weight)
            self.unformed = rows
        else:
            self.weight.grad.add_(self._product(rows))
        return rows

    def pair(self, rows: Rows | None, scale: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Return (P, Q) with gradient P Qᵀ if the pair is cheaper to apply than the gradient and is all of it.

        ``rows`` are the rows that the factors take in, if any. The loss was multiplied by ``scale``; the gradient has
        been divided by it already.
        """
        calls = self._paired or self._pair_calls()
        if not calls:
            return None
        if self.unformed is not None:
            return self.unformed.gradients.mT, self.unformed.inputs.mT
        rows = self._loss_rows(rows, calls, scale)
        pair = rows.gradients.mT, rows.inputs.mT
        if self.gradient_is_pair is None:
            # Checked once in a layer's life: it shows whether the weight is used elsewhere in the loss.
            norm, gradient, dtype = torch.linalg.vector_norm, self.gradient(), self.shape.dtype
            captured = calls[0].inputs, calls[0].gradients["loss"][0], self.weight
            # In half precision rows are rounded independently of each other, and the gradient once more.
            lengths = 2 * norm(norm(pair[0], dim=-2) * norm(pair[1], dim=-2)) + norm(gradient) / 2
            bound = max(torch.finfo(part.dtype).eps for part in captured) * lengths
            bound += 8 * torch.finfo(dtype).eps * norm(pair[0]) * norm(pair[1])
            self.gradient_is_pair = bool(norm(pair[0] @ pair[1].mT - gradient) <= bound)
        return pair if self.gradient_is_pair else None

    def comparison(self, scale: Tensor | None) -> Tensor | None:
        """Return ‖P Qᵀ‖², ⟨P Qᵀ, ∂W⟩, ‖∂W‖², N Σ |γ|² and N of a Linear, if P Qᵀ may be its gradient."""
        calls = self._calls("loss")
        if not (calls and self.kind.can_leave_out and self.capture.gradient_is_captured()) or self.capture.left_out:
            return None
        rows = self._loss_rows(None, calls, scale)
        product, gradient = self._product(rows), self.kind.matrix(self.weight.grad.to(self.shape.dtype))
        sums = [(product * product).sum(), (product * gradient).sum(), (gradient * gradient).sum()]
        return torch.stack([*sums, rows.uses * rows.gradients.square().sum(), gradient.new_tensor(float(rows.uses))])

    @property
    def checked_by_rows(self) -> bool:
        """Whether finite rows of the loss imply a finite gradient, which is then not read: it is their product.

        This holds only if the rows are so few that they take the gradient's place.
        """
        if not self.gradient_is_pair or self.sharing != "expand" or self.weight.dtype != self.shape.dtype:
            return False
        return not [call for call in self.capture.calls if call.valid is not None] and bool(self._pair_calls())

    def gradient(self) -> Tensor:
        """Return the gradient as a matrix."""
        weight, bias = self.kind.weight.grad, self.kind.bias
        if self.unformed is not None:
            weight.copy_(self._product(self.unformed))
            self.unformed = None
        return self._matrix(weight, None if bias is None else bias.grad)

    def parameters(self) -> Tensor:
        """Return the weight and its bias as a matrix. If they are sharded, all processes must call this together."""
        bias = self.kind.bias
        return self._matrix(gathered(self.kind.weight.detach()), None if bias is None else gathered(bias.detach()))

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = self.kind.matrix(self.kind.weight_part(weight).to(self.shape.dtype))
        if not self.has_bias:
            return matrix
        size = (*matrix.shape[:-1], 1)
        column = matrix.new_zeros(size) if bias is None else self.kind.bias_part(bias).to(matrix.dtype).reshape(size)
        return torch.cat([matrix, column], dim=-1)

    def write(self, step: Gradient) -> list[list[StepPart]]:
        """Return the parts of a step by weight. Products P Qᵀ are formed in the gradient's memory if possible."""
        kind, bias, d_in = self.kind, self.bias_gradient, self.shape.d_in - self.has_bias
        parts = [self._write_part(step, 0, d_in, kind.weight_part(self.weight.grad), kind.tensor)]
        if self.has_bias and bias is not None:
            parts.append(self._write_part(step, d_in, 1, bias, lambda column: column.reshape(bias.shape)))
        if kind.weights == 1:
            return [parts]
        return [list(of_weight) for of_weight in zip(*(part.split(kind.weights) for part in parts), strict=True)]

    def mark_stepped(self) -> None:
        """Note that the gradient is a step now. Until somebody writes to it, there is nothing to precondition."""
        self.unformed = None
        if self.weight.grad is not None:
            self._written = Version(self.weight.grad)

    def _write_part(
        self, step: Gradient, start: int, columns: int, gradient: Tensor, arrange: Callable[[Tensor], Tensor]
    ) -> StepPart:
        """Return some columns of a step. A product is formed in the gradient itself, if the gradient is the matrix."""
        if isinstance(step, Tensor):
            return StepPart(arrange(step.narrow(-1, start, columns)), gradient)
        first, second = step[0], step[1].narrow(-2, start, columns)
        if not (self.shape.groups or self.kind.transposed) and gradient.dtype == self.shape.dtype:
            size = first.shape[0], second.shape[0]
            if gradient.shape == size:
                torch.mm(first, second.mT, out=gradient)
                return StepPart(gradient, gradient)
            if (*gradient.shape, 1) == size:
                torch.mv(first, second[0], out=gradient)
                return StepPart(gradient, gradient)
        return StepPart(arrange(first @ second.mT), gradient)

    def _calls_left_out(self) -> list[Call]:
        return [] if self.bias_gradient is None else [call for call in self._calls("loss") if call.left_out]

    def _loss_rows(self, rows: Rows | None, calls: list[Call], scale: Tensor | None) -> Rows:
        """Return rows whose product is the loss's gradient from these calls: the factors' ``rows`` if they have it."""
        # In a factor the rows of padding are 0, but padding may contribute to the gradient.
        if rows is None or rows.per_term or rows.share is not None or self.sharing == "reduce":
            return self._rows_of_calls(calls, "loss", scale, whole=True)
        return rows

    def _product(self, rows: Rows) -> Tensor:
        return rows.gradients.mT @ rows.inputs[..., : self.shape.d_in - self.has_bias]

    def _calls(self, pass_name: Pass) -> list[Call]:
        """Return the calls that have rows: a batch may be empty."""
        return [
            call for call in self.capture.calls if call.gradients[pass_name] and call.gradients[pass_name][0].numel()
        ]

    def _pair_calls(self) -> list[Call]:
        """Return the calls whose pair may be the gradient, if the pair is cheaper to apply; otherwise no calls."""
        kind, shape = self.kind, self.shape
        if self.gradient_is_pair is False or kind.one_hot or kind.single or (self.has_bias and self.bias is None):
            return self._paired
        calls, left_out = self._calls("loss"), self.capture.left_out
        if calls and (self.unformed is not None or (not left_out and self.capture.gradient_is_captured())):
            widest = self.curvature.widest_pair(shape.d_out * shape.d_in)
            numbers = sum([gradient.numel() for call in calls for gradient in call.gradients["loss"]])
            if widest is not None and numbers // (math.prod(shape.groups) * shape.d_out) <= widest:
                self._paired = calls
        return self._paired

    def _shape_now(self) -> Shape:
        kind, weight = self.kind, self.kind.weight
        groups, d_out, d_in = kind.shape
        # Factors and steps have the precision of the weight, and at least float32.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return Shape(groups, d_out, d_in + self.has_bias, dtype, weight.device, kind.one_hot, kind.single)

    def _rows_of_calls(self, calls: list[Call], pass_name: Pass, scale: Tensor | None, *, whole: bool = False) -> Rows:
        """Return the rows of calls in this layer's sharing and the factors' dtype; draws repeat the gradients alone.

        Rows of padding are 0. If ``whole``, there is one row for every sample and position, as it was captured.
        """
        if self.has_transposed_use and len({call.kind.uses_transpose for call in calls}) > 1:
            by_use = [[call for call in calls if call.kind.uses_transpose == flag] for flag in (False, True)]
            return _with_transposed_use(*(self._rows_of_calls(own, pass_name, scale, whole=whole) for own in by_use))
        inputs, gradients, masks, positions, count = [], [], [], set(), 0
        captured = [
            (index, call, gradient) for call in calls for index, gradient in enumerate(call.gradients[pass_name])
        ]
        # The first gradients of all calls come first, then the second ones.
        for index, call, gradient in sorted(captured, key=itemgetter(0)):
            full, is_new = gradient.to(self.shape.dtype), pass_name == "loss" or index == 0
            uses, mask = self._uses(call, full if scale is None else full / scale, whole=whole)
            if mask is not None and is_new:
                masks.append(mask)
            samples, position_count = uses.gradients.shape[-3:-1]
            positions.add(position_count)
            gradients.append(uses.gradients.flatten(-3, -2))
            if is_new or self.has_transposed_use:
                count += samples * position_count
            if is_new or self.has_transposed_use or self.kind.single:
                inputs.append(self._input_rows(uses))
        position_count = positions.pop() if len(positions) == 1 else 1
        joined = inputs[0] if len(inputs) == 1 else _joined(inputs)
        gammas = gradients[0] if len(gradients) == 1 else _joined(gradients)
        rows = Rows(joined, gammas, count, position_count, self.kind.single)
        return self._without_padding(rows, masks, pass_name) if masks else rows

    def _uses(self, call: Call, gradient: Tensor, *, whole: bool) -> tuple[Uses, Tensor | None]:
        """Return the uses of a call, in "reduce" one a sample, and the mask of positions that are not padding.

        A call may have all positions of all samples in one dimension, in the layer's order. Then each is a sample.
        """
        kind, inputs, reduce = call.kind, call.inputs, self.sharing == "reduce" and not whole
        output_ndim = self.kind.weight.ndim if self.kind.single else 1
        if (kind.positions_first or not self.batch_first) and gradient.ndim > 1 + output_ndim:
            inputs, gradient = inputs.transpose(0, 1), gradient.transpose(0, 1)
        groups = call.groups if reduce and kind.is_averaged and not self.shape.groups else None
        valid = call.valid if not whole and (kind.either_order or kind.positions_first) else None
        if valid is not None and not (inputs.shape[:2] == gradient.shape[:2] == valid.shape and gradient.ndim > 2):
            # The mask says nothing about a call of another shape.
            is_flat = inputs.shape[:1] == gradient.shape[:1] == (valid.numel(),) and gradient.ndim == 2
            valid = (valid if self.batch_first else valid.T).reshape(-1, 1) if is_flat else None
        if valid is not None:
            uses, valid = kind.uses_where(valid, inputs, gradient)
        elif reduce and groups is None:
            return kind.reduced(inputs, gradient), None
        else:
            uses = kind.uses(inputs, gradient)
        return averaged(uses, valid, groups) if reduce and kind.is_averaged else (uses, valid)

    def _without_padding(self, rows: Rows, masks: list[Tensor], pass_name: Pass) -> Rows:
        """Scale rows so that means over all rows equal means over the rows that are not padding.

        This divides A by the share of these rows. With the loss's gradients, it multiplies G by the share. Indices have
        no scale: then G takes the scale of A, and the product of both is right.
        """
        if self.kind.single:
            return rows
        empty = torch.stack([mask.numel() - mask.sum() for mask in masks]).sum().to(self.shape.dtype)
        share = (1 - empty / rows.uses).clamp_min(torch.finfo(self.shape.dtype).eps)
        root = share.sqrt()
        inputs, gradients = rows.inputs, rows.gradients * root if pass_name == "loss" else rows.gradients
        if self.kind.one_hot:
            gradients = gradients / root
        else:
            inputs = inputs / root
        return rows._replace(inputs=inputs, gradients=gradients, share=share)

    def _input_rows(self, uses: Uses) -> Tensor:
        """Return input rows with the bias's 1, in the factors' dtype; (N,) indices and whole gradients stay."""
        if self.kind.one_hot:
            return uses.inputs.flatten()
        inputs = uses.inputs.to(self.shape.dtype)
        if self.has_bias and not self.kind.single:
            if uses.ones is None:
                inputs = torch.constant_pad_nd(inputs, (0, 1), 1.0)
            else:
                inputs = torch.cat([inputs, uses.ones.to(self.shape.dtype)], dim=-1)
        return inputs.flatten(-3, -2)


def _with_transposed_use(rows: Rows, transposed: Rows) -> Rows:
    """Add the rows of transposed uses, with a divided and γ multiplied by s, so that both sides have one energy ratio.

    The energy of rows is Σ‖·‖². This s minimizes the trace of the Kronecker product of both factors. The added rows are
    more terms of the same curvature, but not more terms of the loss.
    """
    norm = torch.linalg.vector_norm
    ratios = [norm(other) / norm(part) for part, other in zip(rows[:2], transposed[:2], strict=True)]
    scale = (ratios[0] / ratios[1]).sqrt()
    # If one kind of uses has rows of zeros, there is nothing to balance.
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1)
    return rows._replace(
        inputs=_joined([rows.inputs, transposed.inputs / scale]),
        gradients=_joined([rows.gradients, transposed.gradients * scale]),
        positions=rows.positions if rows.positions == transposed.positions else 1,
    )


def by_strategy(layers: Collection[Layer]) -> list[tuple[Strategy, list[Layer]]]:
    """Group layers by strategy, in their order. Equal strategies of a model are one object."""
    groups = by_kind(layers, [id(layer.strategy) for layer in layers])
    return [(members[0].strategy, members) for members in groups]


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate the rows, or the indices, of several calls."""
    return torch.cat(parts, dim=-2 if parts[0].ndim > 1 else 0)
