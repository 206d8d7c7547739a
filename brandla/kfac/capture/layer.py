"""One weight under K-FAC: its calls as rows, its gradient as a matrix, and the step written back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from brandla._sharded import everywhere
from brandla.kfac.capture.calls import Call, Pass, Recorder, averaged
from brandla.kfac.capture.hooks import Capture
from brandla.kfac.capture.kinds.kind import Kind, Uses
from brandla.kfac.systems.strategy import Curvature, Strategy
from brandla.kfac.values import Gradient, Rows, Shape, Version, by_kind

Sharing = Literal["expand", "reduce"]


@dataclass(eq=False)
class Written:
    """Part of a step, and the gradient that it is for: the same tensor where it has been written."""

    step: Tensor
    gradient: Tensor

    def split(self, count: int) -> list[Written]:
        """Return the parts of so many weights that lie one after the other."""
        steps = self.step.chunk(count)
        gradients = steps if self.step is self.gradient else self.gradient.chunk(count)
        return list(map(Written, steps, gradients))


class Layer:
    """A weight and its bias, as a matrix (*groups, d_out, d_in) with the bias as its last column."""

    def __init__(self, kind: Kind, strategy: Strategy, sharing: Sharing, recorder: Recorder) -> None:
        self.name = kind.name
        self.kind = kind
        self.strategy = strategy
        self.sharing = sharing
        # Whether inputs are (samples, positions, ...), or else (positions, samples, ...); and that in words.
        self.batch_first, self.order = True, ""
        self.has_bias = kind.bias is not None
        self.capture = Capture(kind, recorder)
        # Of the weight and its bias as a matrix, as the curvature is made for it. That of a frozen weight takes no
        # memory: it is made anew when the weight thaws.
        self.shape = self._shape_now()
        if self.is_frozen:
            self.shape = self.shape._replace(device=torch.device("meta"))
        # What there was of the weight when the shape was last looked at.
        self._layout: tuple[Any, ...] = ()
        self.curvature: Curvature = strategy.curvature(self.shape)
        # Whether the gradient is the sum of the captured pairs: None until looked at, once.
        self.linear: bool | None = None if kind.pairs else False
        # Whether the weight is used in its transpose, too.
        self.is_turned = False
        # The weight and the bias that is trained, while a step lasts.
        self.weight: Any = None
        self.bias: nn.Parameter | None = None
        # The rows of the gradient that autograd has not formed, while it is empty memory.
        self.unformed: Rows | None = None
        # The calls of this step whose pair is to be applied, once that is known.
        self._paired: list[Call] = []
        # The gradient as it was overwritten last.
        self._written: Version | None = None
        # Unit vectors (*groups, d_in) that the last step made as long as its spectral norm, where that is its clip.
        self.direction: Tensor | None = None

    def begin(self) -> None:
        """Find the weight and the bias for a step: in the next one a sharded weight may be another tensor."""
        self.weight, self.bias = self.kind.weight, self.kind.bias
        self.unformed, self._paired = None, []
        self.capture.keep_reached()

    def end(self) -> int:
        """Forget what was captured for a step, and return how many bytes that were."""
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
        """Whether there is anything to precondition: a gradient that somebody has written to since the last step."""
        if self.capture.left_out and self._left_out():
            return True
        gradient: Tensor | None = self.weight.grad
        return gradient is not None and not (self._written is not None and self._written.matches(gradient))

    @property
    def is_frozen(self) -> bool:
        """Whether the weight is not trained, and has no gradient from when it was."""
        weight = self.kind.weight
        return not weight.requires_grad and weight.grad is None

    @property
    def is_unseen(self) -> bool:
        """Whether there is a gradient, and no data at all to precondition it with, though it was waited for."""
        was_awaited = bool(self.capture.wanted) and not self.capture.calls
        return was_awaited and not (self.curvature.started or self.kind.was_seen)

    def follow(self, *, thaws: bool = False) -> None:
        """Move the curvature to the dtype and device that the weight has now; where its size is another, start anew.

        That of a frozen weight stays as it is, unless it ``thaws``.
        """
        weight = self.kind.weight if self.weight is None else self.weight
        layout = weight.shape, weight.dtype, weight.device, self.kind.transposed
        if layout == self._layout or (self.is_frozen and not thaws):
            return
        self._layout = layout
        shape, known = self._shape_now(), self.shape
        if shape != known:
            self.shape = shape
            goes_on = self.curvature.started and shape[:3] == known[:3]
            fresh = self.strategy.curvature(shape)
            self.curvature = fresh.loaded(self.curvature.state_dict(), self.name) if goes_on else fresh

    def attach(self, kind: Kind) -> None:
        """Watch another module that uses the weight; where that uses its transpose, the gradient is no one pair."""
        self.capture.attach(kind)
        if kind.turned:
            self.is_turned, self.linear = True, False

    def rows(self, of: Pass, scale: Tensor | None) -> Rows | None:
        """Return the rows of the captured calls as the sharing has them, γ divided by the loss's ``scale``."""
        calls = self._calls(of)
        return self._stacked(calls, of, scale) if calls else None

    def take_gradient(self, rows: Rows | None, scale: Tensor | None) -> Rows | None:
        """Stand in for autograd where it has left the gradient out: return the rows whose product it is.

        The gradient is empty memory until `gradient` fills it. Where autograd has added something else to it, the
        product is added at once. Where it may be made of more than the captured calls, this raises.
        """
        calls = self._left_out()
        if not calls:
            return None
        if not self.capture.gradient_is_pairs():
            message = (
                f"KFAC.step: gradient='pair': the gradient of {self.name}.weight is made of what was captured since the"
                " last step, and that of its bias was not empty before, or has been written to; call zero_grad() with"
                " set_to_none=True after each step, change no gradient before it, or choose gradient='autograd'"
            )
            raise RuntimeError(message)
        rows = self._whole(rows if len(calls) == len(self._calls("loss")) else None, calls, scale)
        if self.weight.grad is None:
            self.weight.grad = torch.empty_like(self.weight)
            self.unformed = rows
        else:
            self.weight.grad.add_(self._product(rows))
        return rows

    def pair(self, rows: Rows | None, scale: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Return (P, Q) with gradient P Qᵀ where it is cheaper to apply than the gradient, and is all of it.

        ``rows`` are those that the factors take in, if any. ``scale`` is what the loss was multiplied by; the gradient
        has been divided by it already.
        """
        calls = self._paired or self._pair_calls()
        if not calls:
            return None
        if self.unformed is not None:
            return self.unformed.gradients.mT, self.unformed.inputs.mT
        rows = self._whole(rows, calls, scale)
        pair = rows.gradients.mT, rows.inputs.mT
        if self.linear is None:
            # Once in a layer's life: a weight used elsewhere in the loss shows here.
            norm, gradient, dtype = torch.linalg.vector_norm, self.gradient(), self.shape.dtype
            of_call = calls[0].inputs, calls[0].gradients["loss"][0], self.weight
            # In half precision rows are rounded independently of each other, and the gradient once more.
            lengths = 2 * norm(norm(pair[0], dim=-2) * norm(pair[1], dim=-2)) + norm(gradient) / 2
            bound = max(torch.finfo(part.dtype).eps for part in of_call) * lengths
            bound += 8 * torch.finfo(dtype).eps * norm(pair[0]) * norm(pair[1])
            self.linear = bool(norm(pair[0] @ pair[1].mT - gradient) <= bound)
        return pair if self.linear else None

    def comparison(self, scale: Tensor | None) -> Tensor | None:
        """Return ‖P Qᵀ‖², ⟨P Qᵀ, ∂W⟩, ‖∂W‖², N Σ |γ|² and N of a Linear, where P Qᵀ may be its gradient."""
        calls = self._calls("loss")
        if not (calls and self.kind.leaves_out and self.capture.gradient_is_pairs()) or self.capture.left_out:
            return None
        rows = self._whole(None, calls, scale)
        product, gradient = self._product(rows), self.kind.matrix(self.weight.grad.to(self.shape.dtype))
        sums = [(product * product).sum(), (product * gradient).sum(), (gradient * gradient).sum()]
        return torch.stack([*sums, rows.uses * rows.gradients.square().sum(), gradient.new_tensor(float(rows.uses))])

    @property
    def checked_by_rows(self) -> bool:
        """Whether a look at the loss's rows says if the gradient is finite: it is their product, and not read itself.

        Only where the rows are so few that they take the gradient's place.
        """
        if not self.linear or self.sharing != "expand" or self.weight.dtype != self.shape.dtype:
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
        """Return the weight and its bias as a matrix; of sharded ones all, which all processes must ask for."""
        bias = self.kind.bias
        return self._matrix(everywhere(self.kind.weight.detach()), None if bias is None else everywhere(bias.detach()))

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = self.kind.matrix(self.kind.weight_part(weight).to(self.shape.dtype))
        if not self.has_bias:
            return matrix
        size = (*matrix.shape[:-1], 1)
        column = matrix.new_zeros(size) if bias is None else self.kind.bias_part(bias).to(matrix.dtype).reshape(size)
        return torch.cat([matrix, column], dim=-1)

    def write(self, step: Gradient) -> list[list[Written]]:
        """Return the parts of a step by weight; products are written into the gradient as they are formed."""
        kind, bias, d_in = self.kind, self.bias_gradient, self.shape.d_in - self.has_bias
        parts = [self._put(step, 0, d_in, kind.weight_part(self.weight.grad), kind.tensor)]
        if self.has_bias and bias is not None:
            parts.append(self._put(step, d_in, 1, bias, lambda column: column.reshape(bias.shape)))
        if kind.weights == 1:
            return [parts]
        return [list(own) for own in zip(*(part.split(kind.weights) for part in parts), strict=True)]

    def seal(self) -> None:
        """Note that the gradient is a step now: until somebody writes to it, there is nothing to precondition."""
        self.unformed = None
        if self.weight.grad is not None:
            self._written = Version(self.weight.grad)

    def _put(
        self, step: Gradient, start: int, columns: int, gradient: Tensor, arranged: Callable[[Tensor], Tensor]
    ) -> Written:
        """Write some columns of a step; a product with no copy, where the gradient is a matrix as it is."""
        if isinstance(step, Tensor):
            return Written(arranged(step.narrow(-1, start, columns)), gradient)
        first, second = step[0], step[1].narrow(-2, start, columns)
        if not (self.shape.groups or self.kind.transposed) and gradient.dtype == self.shape.dtype:
            size = first.shape[0], second.shape[0]
            if gradient.shape == size:
                torch.mm(first, second.mT, out=gradient)
                return Written(gradient, gradient)
            if (*gradient.shape, 1) == size:
                torch.mv(first, second[0], out=gradient)
                return Written(gradient, gradient)
        return Written(arranged(first @ second.mT), gradient)

    def _left_out(self) -> list[Call]:
        return [] if self.bias_gradient is None else [call for call in self._calls("loss") if call.left_out]

    def _whole(self, rows: Rows | None, calls: list[Call], scale: Tensor | None) -> Rows:
        """Return rows whose product is the loss's gradient from these calls: those of the factors, if they are such."""
        # Of padding the rows of a factor are 0, whatever the gradient holds.
        if rows is None or rows.counted or rows.share is not None or self.sharing == "reduce":
            return self._stacked(calls, "loss", scale, whole=True)
        return rows

    def _product(self, rows: Rows) -> Tensor:
        return rows.gradients.mT @ rows.inputs[..., : self.shape.d_in - self.has_bias]

    def _calls(self, of: Pass) -> list[Call]:
        """Return the calls that have rows: a batch may be empty."""
        return [call for call in self.capture.calls if call.gradients[of] and call.gradients[of][0].numel()]

    def _pair_calls(self) -> list[Call]:
        """Return the calls whose pair may be the gradient, if it is cheaper to apply than that; else none."""
        kind, shape = self.kind, self.shape
        if self.linear is False or kind.one_hot or kind.single or (self.has_bias and self.bias is None):
            return self._paired
        calls, left_out = self._calls("loss"), self.capture.left_out
        if calls and (self.unformed is not None or (not left_out and self.capture.gradient_is_pairs())):
            widest = self.curvature.widest_pair(shape.d_out * shape.d_in)
            numbers = sum([gradient.numel() for call in calls for gradient in call.gradients["loss"]])
            if widest is not None and numbers // (math.prod(shape.groups) * shape.d_out) <= widest:
                self._paired = calls
        return self._paired

    def _shape_now(self) -> Shape:
        kind, weight = self.kind, self.kind.weight
        groups, d_out, d_in = kind.shape
        # Factors and steps are in the precision of the weight, but in float32 at least.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return Shape(groups, d_out, d_in + self.has_bias, dtype, weight.device, kind.one_hot, kind.single)

    def _stacked(self, calls: list[Call], of: Pass, scale: Tensor | None, *, whole: bool = False) -> Rows:
        """Return the rows of calls as the sharing has them, in the factors' dtype; draws repeat the gradients alone.

        Rows of padding are 0. As a ``whole``, there is one row for every sample and position, as it was captured.
        """
        if self.is_turned and len(by_side := by_kind(calls, [call.kind.turned for call in calls])) > 1:
            main, turned = sorted(by_side, key=lambda own: own[0].kind.turned)
            return _with_turned(*(self._stacked(own, of, scale, whole=whole) for own in (main, turned)))
        inputs, gradients, valid, positions, count = [], [], [], set(), 0
        found = [(index, call, gradient) for call in calls for index, gradient in enumerate(call.gradients[of])]
        # First the first gradients of all calls, then the second ones.
        for index, call, gradient in sorted(found, key=itemgetter(0)):
            full, is_new = gradient.to(self.shape.dtype), of == "loss" or index == 0
            uses, own = self._uses(call, full if scale is None else full / scale, whole=whole)
            if own is not None and is_new:
                valid.append(own)
            samples, position_count = uses.gradients.shape[-3:-1]
            positions.add(position_count)
            gradients.append(uses.gradients.flatten(-3, -2))
            if is_new or self.is_turned:
                count += samples * position_count
            if is_new or self.is_turned or self.kind.single:
                inputs.append(self._input_rows(uses))
        position_count = positions.pop() if len(positions) == 1 else 1
        joined = inputs[0] if len(inputs) == 1 else _joined(inputs)
        gammas = gradients[0] if len(gradients) == 1 else _joined(gradients)
        rows = Rows(joined, gammas, count, position_count, self.kind.single)
        return self._without_padding(rows, valid, of) if valid else rows

    def _uses(self, call: Call, gradient: Tensor, *, whole: bool) -> tuple[Uses, Tensor | None]:
        """Return the uses of a call, in "reduce" one a sample, and the mask of positions that are not padding.

        A call may have all positions of all samples in one dimension, in the layer's order; then each is a sample.
        """
        kind, inputs, reduce = call.kind, call.inputs, self.sharing == "reduce" and not whole
        # The dimensions of a use's output.
        own = self.kind.weight.ndim if self.kind.single else 1
        if (kind.positions_first or not self.batch_first) and gradient.ndim > 1 + own:
            inputs, gradient = inputs.transpose(0, 1), gradient.transpose(0, 1)
        groups = call.groups if reduce and kind.is_averaged and not self.shape.groups else None
        valid = call.valid if not whole and (kind.may_lead or kind.positions_first) else None
        if valid is not None and not (inputs.shape[:2] == gradient.shape[:2] == valid.shape and gradient.ndim > 2):
            # Of a call of another shape nothing is known.
            is_flat = inputs.shape[:1] == gradient.shape[:1] == (valid.numel(),) and gradient.ndim == 2
            valid = (valid if self.batch_first else valid.T).reshape(-1, 1) if is_flat else None
        if valid is not None:
            uses, valid = kind.uses_where(valid, inputs, gradient)
        elif reduce and groups is None:
            return kind.reduced(inputs, gradient), None
        else:
            uses = kind.uses(inputs, gradient)
        return averaged(uses, valid, groups) if reduce and kind.is_averaged else (uses, valid)

    def _without_padding(self, rows: Rows, valid: list[Tensor], of: Pass) -> Rows:
        """Scale rows so that means over their number are those over the rows that are no padding.

        A becomes 1 / share of what it was, and G, with the loss's gradients, the share of it. Indices have no scale: G
        takes A's then, and their product is right.
        """
        if self.kind.single:
            return rows
        empty = torch.stack([own.numel() - own.sum() for own in valid]).sum().to(self.shape.dtype)
        share = (1 - empty / rows.uses).clamp_min(torch.finfo(self.shape.dtype).eps)
        root = share.sqrt()
        inputs, gradients = rows.inputs, rows.gradients * root if of == "loss" else rows.gradients
        if self.kind.one_hot:
            gradients = gradients / root
        else:
            inputs = inputs / root
        return rows._replace(inputs=inputs, gradients=gradients, share=share)

    def _input_rows(self, uses: Uses) -> Tensor:
        """Rows with the 1 of the bias, in the factors' dtype; (N,) indices and whole gradients stay."""
        if self.kind.one_hot:
            return uses.inputs.flatten()
        inputs = uses.inputs.to(self.shape.dtype)
        if self.has_bias and not self.kind.single:
            if uses.ones is None:
                inputs = torch.constant_pad_nd(inputs, (0, 1), 1.0)
            else:
                inputs = torch.cat([inputs, uses.ones.to(self.shape.dtype)], dim=-1)
        return inputs.flatten(-3, -2)


def _with_turned(rows: Rows, turned: Rows) -> Rows:
    """Add the rows of turned uses, a by 1/s and γ by s, so that on both sides their energies have one ratio.

    The energies are Σ‖·‖²; that s makes the trace of the product of both factors least. These rows are more terms of
    the same curvature, and no more terms of the loss.
    """
    norm = torch.linalg.vector_norm
    ratios = [norm(other) / norm(own) for own, other in zip(rows[:2], turned[:2], strict=True)]
    scale = (ratios[0] / ratios[1]).sqrt()
    # Where one kind of uses has rows of zeros, there is nothing to balance.
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1)
    return rows._replace(
        inputs=_joined([rows.inputs, turned.inputs / scale]),
        gradients=_joined([rows.gradients, turned.gradients * scale]),
        positions=rows.positions if rows.positions == turned.positions else 1,
    )


def by_strategy(layers: Collection[Layer]) -> list[tuple[Strategy, list[Layer]]]:
    """Sort layers by strategy, in their order; equal strategies of a model are one object."""
    alike = by_kind(layers, [id(layer.strategy) for layer in layers])
    return [(members[0].strategy, members) for members in alike]


def _joined(parts: list[Tensor]) -> Tensor:
    """Put rows, or indices, of several calls one after the other."""
    return torch.cat(parts, dim=-2 if parts[0].ndim > 1 else 0)
