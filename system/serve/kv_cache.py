"""Keys and values of all requests, in pages, and attention to them.

    keys_LPBGd [layers, pages, page_size, key-value heads, width]        which page is whose: pages.py and scheduler.py

A micro-batch writes the keys and values of its tokens to their places, then each token looks at its own sequence:
single tokens through `paged_attention`, which reads the pages where they lie; several at once through `paged_prefill`,
and what those two do not know (stick-breaking, tokens that a mixture of depths sent past a layer) from gathered copies.

Legend: L layers, P pages, B tokens of a page, T tokens of the micro-batch, S sequences, M pages of one at most, H query
heads, G key-value heads, C positions of a sequence, d and e widths of keys and of values.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from expertmesh.kernels.paged_attention import gather_pages, paged_attention, paged_prefill
from expertmesh.system.model.attend import Look, attend_to
from expertmesh.system.model.config import ModelConfig

# Of the memory that is free once the model is loaded. The rest is for activations, and on a CPU for everybody else.
CPU_SHARE, GPU_SHARE = 0.25, 0.9


class Span(NamedTuple):
    """New tokens of one request in a flat batch: `length` of them, the first at position `start` of its sequence."""

    pages: list[int]  # of the sequence, in order, the ones to be written to included
    start: int
    length: int


class KVCache:
    """`pages` pages of `page_size` tokens for every layer. What a page holds before it is written means nothing."""

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, device: str, dtype: torch.dtype = torch.float32
    ) -> None:
        def paged(shape: tuple[int, int]) -> torch.Tensor:
            return torch.zeros(config.layers, pages, page_size, *shape, device=device, dtype=dtype)

        self.page_size = page_size
        self.keys_LPBGd = paged(config.attention.key_shape)
        heads, width = config.attention.value_shape
        self.values_in_keys = config.attention.values_in_keys
        self.values_LPBGe = self.keys_LPBGd[..., :width] if self.values_in_keys else paged((heads, width))
        # Tokens that a mixture of depths sent past a layer have no key there.
        depth_layers = config.layers if config.depth else 0
        self.seen_LPB = torch.zeros(depth_layers, pages, page_size, dtype=torch.bool, device=device)

    def copy(self, source: int, target: int) -> None:
        """Copy one page of every layer to another."""
        for paged in (self.keys_LPBGd, self.values_LPBGe, self.seen_LPB):  # values within keys: the same bytes twice
            paged[:, target] = paged[:, source]


def pages_for(config: ModelConfig, page_size: int, tokens: int, device: str, dtype: torch.dtype) -> int:
    """How many pages to have for `tokens` tokens, or for as many of them as free memory has room for.

    Raises ValueError where not even one request of the whole context finds room.
    """
    attention = config.attention
    kept = [attention.key_shape] if attention.values_in_keys else [attention.key_shape, attention.value_shape]
    numbers = sum(heads * width for heads, width in kept)
    page_bytes = config.layers * page_size * numbers * dtype.itemsize
    if device == "cpu":
        room = CPU_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        room = GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    affordable, wanted = int(room // page_bytes), -(-tokens // page_size)
    longest = min(tokens, config.context_length)
    if affordable * page_size < longest:
        raise ValueError(
            f"the cache of one request of {longest} tokens takes {-(-longest // page_size) * page_bytes} bytes, "
            f"{device} has room for {int(room)}: set cache_tokens to what it may hold"
        )
    return min(affordable, wanted)


class Plan(NamedTuple):
    """Where the tokens of a micro-batch are written and what they look at: the same for every layer."""

    spans: list[Span]
    places_T: torch.Tensor  # int64 page * page_size + offset of each token
    single: int  # how many spans, the first ones, are of one token
    table_SM: torch.Tensor  # int32
    lengths_S: torch.Tensor  # int32, of the single ones
    lengths: list[int]


def plan(cache: KVCache, spans: Sequence[Span]) -> Plan:
    """Spans of one token come first."""
    single = sum(span.length == 1 for span in spans)
    assert all(span.length == 1 for span in spans[:single]), "spans of one token come first"
    size, device = cache.page_size, cache.keys_LPBGd.device
    places = [
        span.pages[position // size] * size + position % size
        for span in spans
        for position in range(span.start, span.start + span.length)
    ]
    lengths = [span.start + span.length for span in spans]
    used = [span.pages[: -(-length // size)] for span, length in zip(spans, lengths, strict=True)]
    most = max(map(len, used), default=0)
    table = [pages + [0] * (most - len(pages)) for pages in used]
    return Plan(
        list(spans),
        torch.tensor(places, dtype=torch.int64, device=device),
        single,
        torch.tensor(table, dtype=torch.int32, device=device).view(len(spans), most),
        torch.tensor(lengths[:single], dtype=torch.int32, device=device),
        lengths,
    )


class PagedAttend:
    """Attention of one micro-batch: each request's new tokens see its own pages and themselves (see `Attend`)."""

    cached = True

    def __init__(self, cache: KVCache, planned: Plan, chosen_T: torch.Tensor | None = None) -> None:
        self.cache, self.plan, self.chosen_T = cache, planned, chosen_T

    def among(self, chosen_T: torch.Tensor) -> PagedAttend:
        assert self.chosen_T is None, "tokens are chosen once a layer"
        return PagedAttend(self.cache, self.plan, chosen_T)

    def __call__(
        self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGe: torch.Tensor, look: Look
    ) -> torch.Tensor:
        chosen_T = self.chosen_T
        if chosen_T is not None:  # to their places among all tokens; nobody looks at the gaps
            q_THd, k_TGd, v_TGe = (
                t.new_zeros(len(chosen_T), *t.shape[1:]).index_put((chosen_T,), t) for t in (q_THd, k_TGd, v_TGe)
            )
            self.cache.seen_LPB[layer].flatten().index_copy_(0, self.plan.places_T, chosen_T)
        keys_PBGd, values_PBGe = self.cache.keys_LPBGd[layer], self.cache.values_LPBGe[layer]
        keys_PBGd.flatten(0, 1).index_copy_(0, self.plan.places_T, k_TGd)
        if not self.cache.values_in_keys:
            values_PBGe.flatten(0, 1).index_copy_(0, self.plan.places_T, v_TGe)
        if chosen_T is not None or look.weighting != "softmax":
            o_THe = self._gathered(layer, q_THd, look)
            return o_THe if chosen_T is None else o_THe[chosen_T]
        return self._paged(q_THd, keys_PBGd, values_PBGe, look.window)

    def _paged(
        self, q_THd: torch.Tensor, keys_PBGd: torch.Tensor, values_PBGe: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        spans, _, single, table_SM, lengths_S, lengths = self.plan
        parts = [q_THd.new_empty(0, q_THd.shape[1], values_PBGe.shape[3])]
        if single:
            parts.append(
                paged_attention(q_THd[:single], keys_PBGd, values_PBGe, table_SM[:single], lengths_S, window=window)
            )
        if single < len(spans):
            queries = [span.length for span in spans[single:]]
            pages_SM, totals = table_SM[single:], lengths[single:]
            parts.append(
                paged_prefill(q_THd[single:], keys_PBGd, values_PBGe, pages_SM, totals, queries, window=window)
            )
        return torch.cat(parts) if len(parts) != 2 else parts[1]

    def _gathered(self, layer: int, q_THd: torch.Tensor, look: Look) -> torch.Tensor:
        """One sequence after the other, from copies of its keys and values."""
        cache, planned = self.cache, self.plan
        o_THe = q_THd.new_empty(*q_THd.shape[:2], cache.values_LPBGe.shape[-1])
        first = 0
        for span, pages_M, end in zip(planned.spans, planned.table_SM, planned.lengths, strict=True):
            new = slice(first, first + span.length)
            keys_GCd, values_GCe = (
                gather_pages(paged[layer], pages_M, 0, end) for paged in (cache.keys_LPBGd, cache.values_LPBGe)
            )
            seen_1C = None
            if self.chosen_T is not None:
                seen_1C = gather_pages(cache.seen_LPB[layer, :, :, None, None], pages_M, 0, end)[0, :, 0][None]
            q_HSd = q_THd[new].transpose(0, 1)
            o_HSe = attend_to(q_HSd[None], keys_GCd[None], values_GCe[None], look, seen_1C)[0]
            o_THe[new] = o_HSe.transpose(0, 1)
            first += span.length
        return o_THe
