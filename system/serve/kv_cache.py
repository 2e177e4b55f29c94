"""Keys and values of the requests that are running: one strip of the context's length for each slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from expertmesh.system.model.config import ModelConfig


class Span(NamedTuple):
    """New tokens of one request in a flat batch: `length` of them, the first at position `start` of its sequence."""

    slot: int
    start: int
    length: int


class KVCache:
    """Room for `slots` requests of up to `context_length` tokens each."""

    def __init__(self, config: ModelConfig, slots: int, device: str) -> None:
        attention = config.attention
        shape = (config.layers, slots, attention.kv_heads, config.context_length, attention.head_dim)
        self.keys_LXGCd = torch.zeros(shape, device=device)  # X slots, C positions
        self.values_LXGCd = torch.zeros(shape, device=device)


class CacheAttend:
    """Attention of one step: each request's new tokens see its own cache and themselves, causally (see `Attend`)."""

    def __init__(self, cache: KVCache, spans: list[Span]) -> None:
        self.cache, self.spans = cache, spans

    def __call__(self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor) -> torch.Tensor:
        o_THd = torch.empty_like(q_THd)
        first = 0
        for slot, start, length in self.spans:
            new, end = slice(first, first + length), start + length
            keys_GCd = self.cache.keys_LXGCd[layer, slot]
            values_GCd = self.cache.values_LXGCd[layer, slot]
            keys_GCd[:, start:end] = k_TGd[new].transpose(0, 1)
            values_GCd[:, start:end] = v_TGd[new].transpose(0, 1)
            o_HTd = F.scaled_dot_product_attention(
                q_THd[new].transpose(0, 1)[None],
                keys_GCd[None, :, :end],
                values_GCd[None, :, :end],
                attn_mask=None if length == 1 else _causal(length, end, q_THd.device),
                enable_gqa=True,
            )[0]
            o_THd[new] = o_HTd.transpose(0, 1)
            first += length
        return o_THd


def _causal(length: int, end: int, device: torch.device) -> torch.Tensor:
    """bool [length, end]: the i-th new token sees positions up to its own, which is end - length + i."""
    return torch.ones(length, end, dtype=torch.bool, device=device).tril(end - length)
