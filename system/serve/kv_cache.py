"""Keys and values of the requests that are running: one strip of the context's length for each slot."""

from __future__ import annotations

from typing import NamedTuple

import torch

from expertmesh.system.model.attend import Look, attend_to
from expertmesh.system.model.config import ModelConfig


class Span(NamedTuple):
    """New tokens of one request in a flat batch: `length` of them, the first at position `start` of its sequence."""

    slot: int
    start: int
    length: int


class KVCache:
    """Room for `slots` requests of up to `context_length` tokens each."""

    def __init__(self, config: ModelConfig, slots: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        def strips(shape: tuple[int, int]) -> torch.Tensor:
            heads, width = shape
            return torch.zeros(config.layers, slots, heads, config.context_length, width, device=device, dtype=dtype)

        self.keys_LXGCd = strips(config.attention.key_shape)  # X slots, C positions
        self.values_LXGCe = strips(config.attention.value_shape)
        # Tokens that a mixture of depths sent past a layer have no key there.
        depth_layers = config.layers if config.depth else 0
        self.seen_LXC = torch.zeros(depth_layers, slots, config.context_length, dtype=torch.bool, device=device)


class CacheAttend:
    """Attention of one step: each request's new tokens see its own cache and themselves, causally (see `Attend`)."""

    def __init__(self, cache: KVCache, spans: list[Span], chosen_T: torch.Tensor | None = None) -> None:
        self.cache, self.spans, self.chosen_T = cache, spans, chosen_T

    def among(self, chosen_T: torch.Tensor) -> CacheAttend:
        assert self.chosen_T is None, "tokens are chosen once a layer"
        return CacheAttend(self.cache, self.spans, chosen_T)

    def __call__(
        self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGe: torch.Tensor, look: Look
    ) -> torch.Tensor:
        if self.chosen_T is not None:  # to their places among all tokens; nobody looks at the gaps
            q_THd, k_TGd, v_TGe = (
                t.new_zeros(len(self.chosen_T), *t.shape[1:]).index_put((self.chosen_T,), t)
                for t in (q_THd, k_TGd, v_TGe)
            )
        o_THe = q_THd.new_empty(*q_THd.shape[:2], v_TGe.shape[-1])
        first = 0
        for slot, start, length in self.spans:
            new, end = slice(first, first + length), start + length
            keys_GCd = self.cache.keys_LXGCd[layer, slot]
            values_GCe = self.cache.values_LXGCe[layer, slot]
            keys_GCd[:, start:end] = k_TGd[new].transpose(0, 1)
            values_GCe[:, start:end] = v_TGe[new].transpose(0, 1)
            seen_1C = None
            if self.chosen_T is not None:
                self.cache.seen_LXC[layer, slot, start:end] = self.chosen_T[new]
                seen_1C = self.cache.seen_LXC[layer, slot, None, :end]
            o_HTe = attend_to(
                q_THd[new].transpose(0, 1)[None], keys_GCd[None, :, :end], values_GCe[None, :, :end], look, seen_1C
            )[0]
            o_THe[new] = o_HTe.transpose(0, 1)
            first += length
        return o_THe if self.chosen_T is None else o_THe[self.chosen_T]
