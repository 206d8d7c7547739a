"""``nn.MultiheadAttention``: its projections, packed or apart, and that of its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brandla.kfac.capture.kinds.attention_forward import AttentionForward
from brandla.kfac.capture.kinds.kind import Kind, Uses, full_dtype, own_forward, why_left
from brandla.kfac.capture.kinds.own_forward import ForwardKind


class AttentionKind(ForwardKind):
    """One projection of an attention: inputs and gradients are (positions, samples, d), as they are inside of it."""

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
        packed = module.in_proj_weight is not None
        names = ["in_proj_weight"] if packed else [f"{part}_proj_weight" for part in "qkv"]
        if reason := why_left(module, *names) or why_left(module.out_proj, "weight"):
            return reason
        inner: list[Kind] = [SliceKind(forward, f"{part}_proj", index) for index, part in enumerate("qkv")]
        if packed:
            inner = [PackedKind(forward, "in_proj_weight", "in_proj_bias", "in_proj")]
        return [*inner, cls(forward, "weight", "bias", "out_proj", module.out_proj)]


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
        longest = max(map(len, parts))
        scales = [(longest / len(part)) ** 0.5 for part in parts]
        ones = [part.new_ones(*part.shape[:2], 1) for part in parts]
        return Uses(
            torch.stack([_filled(part * scale, longest) for part, scale in zip(parts, scales, strict=True)]),
            torch.stack([_filled(part / scale, longest) for part, scale in zip(gradients, scales, strict=True)]),
            torch.stack([_filled(part * scale, longest) for part, scale in zip(ones, scales, strict=True)]),
        )

    def reduced(self, inputs: Tensor, gradient: Tensor) -> Uses:
        """Average and sum over the positions of each projection."""
        parts, gradients = _parts(inputs, gradient)
        averages = [part.mean(0, dtype=full_dtype(inputs)) for part in parts]
        sums = [part.sum(0, dtype=full_dtype(gradient)) for part in gradients]
        return Uses(torch.stack(averages)[:, :, None], torch.stack(sums)[:, :, None])


def _parts(inputs: Tensor, gradient: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return inputs and gradients of each projection, (positions, samples, d)."""
    if gradient.shape[-1] > inputs.shape[-1]:
        return [inputs] * 3, list(gradient.chunk(3, dim=-1))
    more = len(gradient) - len(inputs)
    if more > 0:
        query, key = inputs.split((len(inputs) - more, more))
        parts = [query, key, key]
    else:
        keys = (len(gradient) + more) // 2
        query, key, value, _ = inputs.split((-more, keys, keys, -more))
        parts = [query, key, value]
    return parts, list(gradient.split([len(part) for part in parts]))


def _filled(part: Tensor, length: int) -> Tensor:
    """Put samples first, and fill up with zeros to so many positions."""
    return nn.functional.pad(part.transpose(0, 1), (0, 0, 0, length - len(part)))
