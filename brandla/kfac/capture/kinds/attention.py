"""``nn.MultiheadAttention``: its input projections, packed or separate, and its output projection.

The module hands its weights to a function and calls no submodule that a hook could watch. So its forward pass runs with
projections that are watched.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from brandla.kfac.capture.kinds.kind import Kind, Uses, full_dtype, overridden_forward, unusable
from brandla.kfac.capture.kinds.watched_forward import ForwardKind, WatchedForward, with_globals


class AttentionKind(ForwardKind):
    """One projection of an attention, in which inputs and outputs are (positions, samples, d)."""

    positions_first = True

    @classmethod
    def of(cls, module: nn.Module) -> list[Kind] | str | None:
        if not isinstance(module, nn.MultiheadAttention):
            return None
        forward = AttentionForward.of(module)
        if overridden_forward(module, nn.MultiheadAttention) or forward is None:
            return overridden_forward(module)
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds positions to keys and values (add_bias_kv, add_zero_attn)"
        inner: list[AttentionKind] = [SliceKind(forward, f"{part}_proj", index) for index, part in enumerate("qkv")]
        if module.in_proj_weight is not None:
            inner = [PackedKind(forward, "in_proj_weight", "in_proj_bias", "in_proj")]
        reason = unusable(module, *(kind._weight for kind in inner)) or unusable(module.out_proj, "weight")
        return reason or [*inner, cls(forward, "weight", "bias", "out_proj", module.out_proj)]


class SliceKind(AttentionKind):
    """The projection of queries, keys or values by a separate weight, with a third of the common bias."""

    def __init__(self, forward: AttentionForward, part: str, index: int) -> None:
        super().__init__(forward, f"{part}_weight", "in_proj_bias", part)
        self._index = index

    def bias_part(self, bias: Tensor) -> Tensor:
        return bias.chunk(3)[self._index]


class PackedKind(AttentionKind):
    """The three projections as groups of one weight.

    In self-attention there is one input, and the output holds the three projections side by side,
    (positions, samples, 3 d). Otherwise the output concatenates them along positions: (positions of queries, keys and
    values, samples, d). The input concatenates queries and keys, if keys are values, and otherwise queries, keys,
    values and queries again. So the shapes alone show which rows belong to which projection.

    Groups must have equally many rows. If queries and keys differ in number, zeros fill up the rows. The rows of a
    group are scaled, a by s and γ by 1/s, so that means and sums are those of the group's own rows.
    """

    weights = 3

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        d = self.weight.shape[1]
        return (3,), d, d

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        parts, gradients = _by_projection(inputs, gradient)
        lengths = [part.shape[1] for part in parts]

        def padded(rows: list[Tensor], power: float) -> Tensor:
            scaled = [part * (max(lengths) / length) ** power for part, length in zip(rows, lengths, strict=True)]
            pads = [(0, 0, 0, max(lengths) - length) for length in lengths]
            return torch.stack(list(map(functional.pad, scaled, pads)))

        ones = [part.new_ones(*part.shape[:2], 1) for part in parts]
        return Uses(padded(parts, 0.5), padded(gradients, -0.5), padded(ones, 0.5))

    def reduced(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Average and sum over the positions of each projection."""
        parts, gradients = _by_projection(inputs, gradient)
        averages = [part.mean(1, keepdim=True, dtype=full_dtype(inputs)) for part in parts]
        sums = [part.sum(1, keepdim=True, dtype=full_dtype(gradient)) for part in gradients]
        return Uses(torch.stack(averages), torch.stack(sums))


def _by_projection(inputs: Tensor, gradient: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return inputs and gradients of each projection, (samples, positions, d)."""
    if gradient.shape[-1] > inputs.shape[-1]:
        return [inputs] * 3, list(gradient.chunk(3, dim=-1))
    length, total = inputs.shape[1], gradient.shape[1]
    # Inputs of queries and keys are shorter than the outputs by the keys; those with queries twice longer by queries.
    difference = total - length
    if difference > 0:
        query, key = inputs.split((length - difference, difference), 1)
        parts = [query, key, key]
    else:
        queries, keys = -difference, (total + difference) // 2
        query, key, value, _ = inputs.split((queries, keys, keys, queries), 1)
        parts = [query, key, value]
    return parts, list(gradient.split([part.shape[1] for part in parts], 1))


class AttentionForward(WatchedForward):
    """Runs the forward pass of an attention, and reports its projections."""

    compiles = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        attend = with_globals(
            functional.multi_head_attention_forward,
            _in_projection_packed=self._project_packed,
            _in_projection=self._project_apart,
            linear=self._project_output,
            # A torch function mode must see the functions inside, not this one as a whole.
            has_torch_function=lambda _: False,
        )
        functions = SimpleNamespace(**{**vars(functional), "multi_head_attention_forward": attend})
        self.run_watched = with_globals(nn.MultiheadAttention.forward, F=functions)
        # Positions and samples of the queries in the call that is running.
        self._size = torch.Size()

    def _project_output(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Project outputs, given as a matrix (positions · samples, d) and captured as (positions, samples, d)."""
        output = linear(inputs, weight, bias).unflatten(0, self._size)
        return self.recorded("out_proj", inputs.unflatten(0, self._size), output).flatten(0, 1)

    def _project_apart(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Project queries, keys and values (positions, samples, d) by three weights, with three biases."""
        parts, weights, biases = arguments[:3], arguments[3:6], arguments[6:]
        self._size = parts[0].shape[:2]
        return tuple(
            self.recorded(f"{name}_proj", part, linear(part, weight, bias))
            for name, part, weight, bias in zip("qkv", parts, weights, biases, strict=True)
        )

    def _project_packed(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Project inputs (positions, samples, d) by one weight. Different inputs are captured as one tensor."""
        self._size = query.shape[:2]
        if query is key and key is value:
            joint = self.recorded("in_proj", query, linear(query, weight, bias))
            # Three contiguous blocks, as in the module.
            return tuple(joint.unflatten(-1, (3, -1)).movedim(-2, 0).contiguous())
        # A private function of torch.
        outputs = functional._in_projection_packed(query, key, value, weight, bias)  # type: ignore[attr-defined]
        if not self.is_watched("in_proj"):
            return tuple(outputs)
        # The order from which `PackedKind` tells them apart.
        parts = [query, key] if key is value else [query, key, value, query]
        inputs = torch.cat([part.detach() for part in parts])
        joint = self.recorded("in_proj", inputs, torch.cat(outputs))
        return tuple(joint.split([len(query), len(key), len(value)]))
