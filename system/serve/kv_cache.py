"""Keys and values of the requests that are running: one strip of the context's length for each slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from expertmesh.system.model.attention import causal_mask
from expertmesh.system.model.config import ModelConfig


class Span(NamedTuple):
    """New tokens of one request in a flat batch: `length` of them, the first at position `start` of its sequence."""

    slot: int
    start: int
    length: int


class KVCache:
    """Room for `slots` requests of up to `context_length` tokens each."""

    def __init__(self, config: ModelConfig, slots: int, device: str) -> None:
        def strips(shape: tuple[int, int]) -> torch.Tensor:
            heads, width = shape
            return torch.zeros(config.layers, slots, heads, config.context_length, width, device=device)

        self.keys_LXGCd = strips(config.attention.key_shape)  # X slots, C positions
        self.values_LXGCe = strips(config.attention.value_shape)


class CacheAttend:
    """Attention of one step: each request's new tokens see its own cache and themselves, causally (see `Attend`)."""

    def __init__(self, cache: KVCache, spans: list[Span]) -> None:
        self.cache, self.spans = cache, spans

    def __call__(
        self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGe: torch.Tensor, window: int | None = None
    ) -> torch.Tensor:
        o_THe = q_THd.new_empty(*q_THd.shape[:2], v_TGe.shape[-1])
        first = 0
        for slot, start, length in self.spans:
            new, end = slice(first, first + length), start + length
            keys_GCd = self.cache.keys_LXGCd[layer, slot]
            values_GCe = self.cache.values_LXGCe[layer, slot]
            keys_GCd[:, start:end] = k_TGd[new].transpose(0, 1)
            values_GCe[:, start:end] = v_TGe[new].transpose(0, 1)
            sees_all = length == 1 and (window is None or end <= window)
            o_HTe = F.scaled_dot_product_attention(
                q_THd[new].transpose(0, 1)[None],
                keys_GCd[None, :, :end],
                values_GCe[None, :, :end],
                attn_mask=None if sees_all else causal_mask(length, end, window, q_THd.device),
                enable_gqa=True,
            )[0]
            o_THe[new] = o_HTe.transpose(0, 1)
            first += length
        return o_THe
