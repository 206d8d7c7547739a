"""The forward pass of ``nn.MultiheadAttention``, with its projections in sight of the capture."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from brandla.kfac.capture.kinds.own_forward import OwnForward


class AttentionForward(OwnForward):
    """Takes the place of the forward pass of one ``nn.MultiheadAttention``.

    The module hands its weights to a function and calls no submodule that a hook could watch. This computes the same,
    operation by operation. What cannot be captured, calls without gradients or those that the module itself would
    refuse, it leaves to the module.
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
        projected = self._project_in(*inputs)
        output, weights = _attend(module, *projected, masks, need_weights=need_weights)
        output = self._project_out(output)
        if not batched:
            output = output.squeeze(1)
        elif module.batch_first:
            output = output.transpose(1, 0)
        if weights is None:
            return output, None
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return output, weights if batched else weights.squeeze(0)

    def _project_in(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module = self.module
        if module._qkv_same_embed_dim is False:
            return self._project_apart(query, key, value)
        if query is key and key is value:
            joint = self.recorded("in_proj", query, linear(query, module.in_proj_weight, module.in_proj_bias))
            # Three blocks, as the module makes them.
            query, key, value = joint.unflatten(-1, (3, -1)).movedim(-2, 0).contiguous()
            return query, key, value
        return self._project_packed(query, key, value)

    def _project_packed(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project inputs that are not all the same; they pass the capture as one, one after the other."""
        module = self.module
        bias: Tensor | None = module.in_proj_bias
        d = module.embed_dim
        first = linear(query, module.in_proj_weight[:d], None if bias is None else bias[:d])
        if key is value:
            both = linear(key, module.in_proj_weight[d:], None if bias is None else bias[d:])
            others = list(both.unflatten(-1, (2, -1)).movedim(-2, 0).contiguous())
        else:
            parts = zip((key, value), module.in_proj_weight[d:].chunk(2), _thirds(bias)[1:], strict=True)
            others = [linear(part, weight, own) for part, weight, own in parts]
        if not self.is_watched("in_proj"):
            return first, others[0], others[1]
        # As `PackedKind` tells them apart.
        inputs = [query, key] if key is value else [query, key, value, query]
        joint = self.recorded("in_proj", torch.cat([part.detach() for part in inputs]), torch.cat([first, *others]))
        query, key, value = joint.split([len(query), len(key), len(value)])
        return query, key, value

    def _project_apart(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = [getattr(self.module, f"{part}_proj_weight") for part in "qkv"]
        parts = zip("qkv", (query, key, value), weights, _thirds(self.module.in_proj_bias), strict=True)
        query, key, value = (
            self.recorded(f"{part}_proj", inputs, linear(inputs, weight, bias)) for part, inputs, weight, bias in parts
        )
        return query, key, value

    def _project_out(self, output: Tensor) -> Tensor:
        """(positions, samples, d), multiplied as a matrix as the module does."""
        own = self.module.out_proj
        projected = linear(output.flatten(0, 1), own.weight, own.bias).view(*output.shape[:2], -1)
        return self.recorded("out_proj", output, projected)


class _Masks(NamedTuple):
    """What may not be attended to: True, or a number that is added, over queries and keys and over keys of samples."""

    attention: Tensor | None
    padding: Tensor | None
    is_causal: bool

    def merged(self, dtype: torch.dtype, samples: int, heads: int) -> Tensor | None:
        """Return (1 or samples · heads, queries or 1, keys), to be added."""
        attention, padding = _added(self.attention, dtype), _added(self.padding, dtype)
        if attention is not None and attention.ndim == 2:
            attention = attention[None]
        if padding is None:
            return attention
        padding = padding.view(samples, 1, 1, -1).expand(-1, heads, -1, -1).flatten(0, 1)
        return padding if attention is None else attention + padding


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _thirds(bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if bias is None else bias.chunk(3)


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
    if any(part.is_nested or part.layout is not torch.strided for part in parts):
        return False
    if query.ndim not in (2, 3) or (query.shape[-1], key.shape[-1], value.shape[-1]) != (
        module.embed_dim,
        module.kdim,
        module.vdim,
    ):
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
