"""``nn.MultiheadAttention``: its projections, packed or apart, and that of its output.

The module hands its weights to a function and calls no submodule that a hook could watch. So its forward pass runs with
projections of ours in place of the function's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear

from brandla.kfac.capture.kinds.kind import Kind, Uses, full_dtype, own_forward, why_left
from brandla.kfac.capture.kinds.own_forward import ForwardKind, OwnForward, finding


class AttentionKind(ForwardKind):
    """One projection of an attention: inputs and outputs are (positions, samples, d) inside of it."""

    positions_first = True

    @classmethod
    def of(cls, module: nn.Module) -> list[Kind] | str | None:
        if not isinstance(module, nn.MultiheadAttention):
            return None
        forward = AttentionForward.of(module)
        if own_forward(module, nn.MultiheadAttention) or forward is None:
            return own_forward(module)
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds positions to keys and values (add_bias_kv, add_zero_attn)"
        inner: list[Kind] = [SliceKind(forward, f"{part}_proj", index) for index, part in enumerate("qkv")]
        if module.in_proj_weight is not None:
            inner = [PackedKind(forward, "in_proj_weight", "in_proj_bias", "in_proj")]
        reason = why_left(module, *(own._weight for own in inner)) or why_left(module.out_proj, "weight")
        return reason or [*inner, cls(forward, "weight", "bias", "out_proj", module.out_proj)]


class SliceKind(AttentionKind):
    """The projection of queries, keys or values by a weight of its own, with a third of the common bias."""

    def __init__(self, forward: AttentionForward, part: str, index: int) -> None:
        super().__init__(forward, f"{part}_weight", "in_proj_bias", part)
        self._index = index

    def bias_part(self, bias: Tensor) -> Tensor:
        return bias.chunk(3)[self._index]


class PackedKind(AttentionKind):
    """The three projections as groups of one weight.

    In self-attention the input is one and its output holds the three side by side, (positions, samples, 3 d). Elsewhere
    they follow one another in outputs, (positions of queries, keys and values, samples, d), and inputs do: queries
    and keys, where keys are values; else queries, keys, values and queries again. So what is whose can be told from the
    shapes alone.

    Groups have equally many rows: where there are more keys than queries, or the other way, zeros fill up the rows,
    and those of a group are scaled, a by s and γ by 1/s, so that mean and sum are those of its own rows.
    """

    weights = 3

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        d = self.weight.shape[1]
        return (3,), d, d

    def uses(self, inputs: Tensor, gradient: Tensor) -> Uses:
        parts, gradients = _parts(inputs, gradient)
        lengths = [part.shape[1] for part in parts]

        def filled(rows: list[Tensor], power: float) -> Tensor:
            scaled = [own * (max(lengths) / length) ** power for own, length in zip(rows, lengths, strict=True)]
            pads = [(0, 0, 0, max(lengths) - length) for length in lengths]
            return torch.stack(list(map(functional.pad, scaled, pads)))

        ones = [part.new_ones(*part.shape[:2], 1) for part in parts]
        return Uses(filled(parts, 0.5), filled(gradients, -0.5), filled(ones, 0.5))

    def reduced(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Average and sum over the positions of each projection."""
        parts, gradients = _parts(inputs, gradient)
        averages = [part.mean(1, keepdim=True, dtype=full_dtype(inputs)) for part in parts]
        sums = [part.sum(1, keepdim=True, dtype=full_dtype(gradient)) for part in gradients]
        return Uses(torch.stack(averages), torch.stack(sums))


def _parts(inputs: Tensor, gradient: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return inputs and gradients of each projection, (samples, positions, d)."""
    if gradient.shape[-1] > inputs.shape[-1]:
        return [inputs] * 3, list(gradient.chunk(3, dim=-1))
    length, total = inputs.shape[1], gradient.shape[1]
    more = total - length
    if more > 0:
        query, key = inputs.split((length - more, more), 1)
        parts = [query, key, key]
    else:
        keys = (total + more) // 2
        query, key, value, _ = inputs.split((-more, keys, keys, -more), 1)
        parts = [query, key, value]
    return parts, list(gradient.split([part.shape[1] for part in parts], 1))


class AttentionForward(OwnForward):
    """Runs what an attention does with its projections in sight."""

    compiles = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        attend = finding(
            functional.multi_head_attention_forward,
            _in_projection_packed=self._packed,
            _in_projection=self._apart,
            linear=self._projected,
            # What looks at the functions that are called is to see those inside.
            has_torch_function=lambda _: False,
        )
        functions = SimpleNamespace(**{**vars(functional), "multi_head_attention_forward": attend})
        self.in_sight = finding(nn.MultiheadAttention.forward, F=functions)
        # Positions and samples of the queries of the call that is going on.
        self._size = torch.Size()

    def _projected(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Project outputs, given as a matrix (positions · samples, d) and captured as (positions, samples, d)."""
        output = linear(inputs, weight, bias).unflatten(0, self._size)
        return self.recorded("out_proj", inputs.unflatten(0, self._size), output).flatten(0, 1)

    def _apart(self, *of_call: Any) -> tuple[Tensor, ...]:
        """Project queries, keys and values (positions, samples, d) by three weights, with three biases."""
        parts, weights, biases = of_call[:3], of_call[3:6], of_call[6:]
        self._size = parts[0].shape[:2]
        return tuple(
            self.recorded(f"{name}_proj", part, linear(part, weight, bias))
            for name, part, weight, bias in zip("qkv", parts, weights, biases, strict=True)
        )

    def _packed(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Project inputs (positions, samples, d) by one weight; those that are not all the same are captured as one."""
        self._size = query.shape[:2]
        if query is key and key is value:
            joint = self.recorded("in_proj", query, linear(query, weight, bias))
            # Three blocks, as the module makes them.
            return tuple(joint.unflatten(-1, (3, -1)).movedim(-2, 0).contiguous())
        # A function of torch's own use, which it does not list.
        outputs = functional._in_projection_packed(query, key, value, weight, bias)  # type: ignore[attr-defined]
        if not self.is_watched("in_proj"):
            return tuple(outputs)
        # One after the other, as `PackedKind` tells them apart.
        parts = [query, key] if key is value else [query, key, value, query]
        inputs = torch.cat([part.detach() for part in parts])
        joint = self.recorded("in_proj", inputs, torch.cat(outputs))
        return tuple(joint.split([len(query), len(key), len(value)]))
