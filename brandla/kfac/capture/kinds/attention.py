"""``nn.MultiheadAttention``: its projections, packed or apart, and that of its output.

The module hands its weights to a function and calls no submodule that a hook could watch. So a forward pass with the
products in sight takes the place of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from brandla.kfac.capture.kinds.kind import Kind, Uses, full_dtype, own_forward, why_left
from brandla.kfac.capture.kinds.own_forward import ForwardKind, OwnForward


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


class AttentionForward(OwnForward):
    """Computes what an attention does, operation by operation, with its projections in sight.

    What cannot be captured, calls without gradients or those that the module itself would refuse, it leaves to the
    module.
    """

    module: nn.MultiheadAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.module
        masks = _Masks(attn_mask, key_padding_mask, is_causal)
        if not torch.is_grad_enabled() or not _is_regular(module, query, key, value, masks):
            return type(module).forward(
                module, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.ndim == 3
        inputs = _positions_first(query, key, value, module.batch_first if batched else None)
        query, key, value = self._projected(*inputs)
        output, weights = _attend(module, query, key, value, masks, need_weights=need_weights)
        # (positions, samples, d), multiplied as a matrix as the module does.
        own = module.out_proj
        projected = linear(output.flatten(0, 1), own.weight, own.bias).view(*output.shape[:2], -1)
        output = self.recorded("out_proj", output, projected)
        if not batched:
            output = output.squeeze(1)
        elif module.batch_first:
            output = output.transpose(1, 0)
        if weights is None:
            return output, None
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return output, weights if batched else weights.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Project inputs (positions, samples, d); those that are not all the same pass the capture as one."""
        module, d = self.module, self.module.embed_dim
        bias: Tensor | None = module.in_proj_bias
        if query is key and key is value and module._qkv_same_embed_dim:
            joint = self.recorded("in_proj", query, linear(query, module.in_proj_weight, bias))
            # Three blocks, as the module makes them.
            return tuple(joint.unflatten(-1, (3, -1)).movedim(-2, 0).contiguous())
        joins = key is value and module._qkv_same_embed_dim
        parts, sizes = ([query, key], [d, 2 * d]) if joins else ([query, key, value], [d, d, d])
        biases: Sequence[Tensor | None] = [None] * len(sizes) if bias is None else bias.split(sizes)
        if not module._qkv_same_embed_dim:
            weights = [getattr(module, f"{part}_proj_weight") for part in "qkv"]
            return tuple(
                self.recorded(f"{name}_proj", part, linear(part, weight, own))
                for name, part, weight, own in zip("qkv", parts, weights, biases, strict=True)
            )
        packed = zip(parts, module.in_proj_weight.split(sizes), biases, strict=True)
        outputs = [linear(part, weight, own) for part, weight, own in packed]
        if joins:
            outputs[1:] = outputs[1].unflatten(-1, (2, -1)).movedim(-2, 0).contiguous()
        if not self.is_watched("in_proj"):
            return tuple(outputs)
        # One after the other, as `PackedKind` tells them apart.
        inputs = torch.cat([part.detach() for part in (parts if joins else [*parts, query])])
        joint = self.recorded("in_proj", inputs, torch.cat(outputs))
        return tuple(joint.split([len(query), len(key), len(value)]))


class _Masks(NamedTuple):
    """What may not be attended to: True, or a number that is added, over queries and keys and over keys of samples."""

    attention: Tensor | None
    padding: Tensor | None
    is_causal: bool

    def merged(self, dtype: torch.dtype, samples: int, heads: int) -> Tensor | None:
        """Return (1 or samples · heads, queries or 1, keys), to be added."""
        attention, padding = (
            mask
            if mask is None or mask.is_floating_point()
            else torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
            for mask in (self.attention, self.padding)
        )
        if attention is not None and attention.ndim == 2:
            attention = attention[None]
        if padding is None:
            return attention
        padding = padding.view(samples, 1, 1, -1).expand(-1, heads, -1, -1).flatten(0, 1)
        return padding if attention is None else attention + padding


def _attend(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, masks: _Masks, *, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (queries, samples, d) and, if they are needed, the weights (samples, heads, queries, keys)."""
    samples, heads = query.shape[1], module.num_heads
    dropout = module.dropout if module.training else 0.0
    is_causal = masks.is_causal and masks.padding is None and not need_weights
    mask = None if is_causal else masks.merged(query.dtype, samples, heads)
    # (samples · heads, positions, d / heads)
    query, key, value = (part.view(len(part), samples * heads, -1).transpose(0, 1) for part in (query, key, value))
    if need_weights:
        scaled = query * math.sqrt(1.0 / query.shape[-1])
        scores = torch.bmm(scaled, key.mT) if mask is None else torch.baddbmm(mask, scaled, key.mT)
        weights = scores.softmax(-1)
        weights = nn.functional.dropout(weights, dropout) if dropout > 0 else weights
        output = torch.bmm(weights, value).transpose(0, 1)
        return output.reshape(len(output), samples, -1), weights.unflatten(0, (samples, heads))
    if mask is not None:
        mask = mask[None] if len(mask) == 1 else mask.unflatten(0, (samples, heads))
    query, key, value = (part.unflatten(0, (samples, heads)) for part in (query, key, value))
    output = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)
    return output.permute(2, 0, 1, 3).flatten(2), None


def _positions_first(
    query: Tensor, key: Tensor, value: Tensor, batch_first: bool | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring inputs to (positions, samples, d), what is the same object staying so; None stands for a single sample."""
    arranged: dict[int, Tensor] = {}
    for part in (query, key, value):
        if batch_first is None:
            arranged[id(part)] = part.unsqueeze(1)
        else:
            arranged[id(part)] = part.transpose(1, 0) if batch_first else part
    return arranged[id(query)], arranged[id(key)], arranged[id(value)]


def _is_regular(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, masks: _Masks) -> bool:
    """Say whether shapes and types are those that the module takes."""
    parts: tuple[Any, Any, Any] = (query, key, value)
    if not all(isinstance(part, Tensor) and part.ndim == query.ndim for part in parts):
        return False
    if any(part.is_nested or part.layout is not torch.strided for part in parts) or query.ndim not in (2, 3):
        return False
    if [part.shape[-1] for part in parts] != [module.embed_dim, module.kdim, module.vdim]:
        return False
    if masks.is_causal and masks.attention is None:
        return False
    query, key, value = _positions_first(*parts, module.batch_first if query.ndim == 3 else None)
    queries, samples, keys = *query.shape[:2], len(key)
    if key.shape[1] != samples or value.shape[:2] != key.shape[:2]:
        return False
    shapes = ((queries, keys), (samples * module.num_heads, queries, keys))
    of_padding = ((samples, keys),) if parts[0].ndim == 3 else ((keys,),)
    return _is_mask(masks.attention, shapes) and _is_mask(masks.padding, of_padding)


def _is_mask(mask: Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> bool:
    return mask is None or (tuple(mask.shape) in shapes and (mask.dtype == torch.bool or mask.is_floating_point()))
