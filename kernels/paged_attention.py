"""Attention of new tokens to the keys and values of their own sequence, which lie in pages anywhere in the cache.

A sequence grows by a page when its last one is full, and any free page will do, so the cache is used up before memory
is lost to gaps (PagedAttention, arXiv 2309.06180, section 4). `table_SM` says which pages a sequence has, in order:

    table_SM = [[4, 1, -], [2, -, -]]    lengths_S = [5, 2]    3 positions a page
    sequence 0: page 4 holds positions 0 1 2, page 1 holds 3 4;    sequence 1: page 2 holds 0 1

The newest token's key and value are in the cache before it looks. Query head h looks at key-value head h // (H / G):

    p_C = softmax(scale * keys[visible C positions] @ q)    o_e = sum over C of p * values[C]

One form serves every kind of attention with few key-value heads: grouped queries (1 < G < H), Step-3's MFA (G = 1,
arXiv 2412.19255), and MLA with its projections absorbed (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). There the one
key is [latent | rotary part], d = r + rope wide, and the value is the latent, the first r numbers of the key: give
`values = keys[..., :r]`, a view, and they are read once. Sequence lengths stay on the device in `paged_attention` (one
query each); `paged_prefill` (any number) is gather and torch's attention everywhere, and takes numbers of the host.

Legend: S sequences, T new tokens, H query heads, G key-value heads, P pages, B positions a page, M pages of a sequence
at most, C positions of one sequence, d and e widths of keys and of values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from expertmesh.kernels import paged_attention_triton as kernels
from expertmesh.kernels.device import by_triton
from expertmesh.kernels.ops import operation


def _check(
    q_THd: torch.Tensor,
    keys_PBGd: torch.Tensor,
    values_PBGe: torch.Tensor,
    table_SM: torch.Tensor,
    sequences: int,
    window: int | None,
) -> None:
    """Raise ValueError where they disagree; looks at shapes and dtypes only, so it never waits for a device."""
    (_, H, d), (P, B, G, _) = q_THd.shape, keys_PBGd.shape
    if keys_PBGd.shape[3] != d or values_PBGe.shape[:3] != (P, B, G) or H % G or len(table_SM) != sequences:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q_THd, keys_PBGd, values_PBGe, table_SM))
        raise ValueError(f"q [T, H, d], keys [P, B, G, d], values [P, B, G, e] and table [S, M] do not fit: {shapes}")
    if not q_THd.dtype == keys_PBGd.dtype == values_PBGe.dtype:
        raise ValueError(f"q is {q_THd.dtype}, keys are {keys_PBGd.dtype} and values {values_PBGe.dtype}; cast them")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a token sees itself at least, so it must be 1 or more")


def gather_pages(cache_PBGx: torch.Tensor, pages_M: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """[G, C, x] a copy of one sequence's positions first..end (of the host), for attentions that no kernel here has.

    Args:
        cache_PBGx: [P, B, G, x] keys or values.
        pages_M: [M] int32 the sequence's pages, in order, down to where `end` lies at least.
    """
    size = cache_PBGx.shape[1]
    skipped = first // size
    pages = cache_PBGx.index_select(0, pages_M[skipped : -(-end // size)]).flatten(0, 1)
    return pages[first - skipped * size : end - skipped * size].transpose(0, 1)


def _by_sequence(
    q_SHd: torch.Tensor,
    keys_PBGd: torch.Tensor,
    values_PBGe: torch.Tensor,
    table_SM: torch.Tensor,
    lengths_S: torch.Tensor,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Gather and torch's attention, one sequence after the other. With one token nothing is hidden from any query, so
    the heads that share a key-value head are queries of one matrix product, and need no mask."""
    groups = keys_PBGd.shape[2]
    o_SHe = q_SHd.new_zeros(*q_SHd.shape[:2], values_PBGe.shape[3])
    for s, length in enumerate(lengths_S.tolist()):
        if length:
            first = 0 if window is None else max(0, length - window)
            keys_GCd = gather_pages(keys_PBGd, table_SM[s], first, length)
            values_GCe = gather_pages(values_PBGe, table_SM[s], first, length)
            q_GNd = q_SHd[s].unflatten(0, (groups, -1))
            o_GNe = functional.scaled_dot_product_attention(q_GNd[None], keys_GCd[None], values_GCe[None], scale=scale)
            o_SHe[s] = o_GNe[0].flatten(0, 1)
    return o_SHe


def _fake(q_SHd, keys_PBGd, values_PBGe, table_SM, lengths_S, window, scale):
    return q_SHd.new_empty(*q_SHd.shape[:2], values_PBGe.shape[3])


@operation(
    "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor lengths, int? window, float scale)"
    " -> Tensor",
    _fake,
)
def _paged_attention(q_SHd, keys_PBGd, values_PBGe, table_SM, lengths_S, window, scale):
    way = kernels.paged_attention if by_triton(q_SHd) else _by_sequence
    return way(q_SHd, keys_PBGd, values_PBGe, table_SM, lengths_S, window, scale)


def paged_attention(
    q_SHd: torch.Tensor,
    keys_PBGd: torch.Tensor,
    values_PBGe: torch.Tensor,
    table_SM: torch.Tensor,
    lengths_S: torch.Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Answer the newest token of each sequence. For decoding: not differentiable.

    Args:
        q_SHd: [S, H, d] bfloat16 or float32 (the CPU also takes float64); H a multiple of G.
        keys_PBGd: [P, B, G, d] in q's dtype, any strides with the last dimension contiguous.
        values_PBGe: [P, B, G, e] likewise; `keys_PBGd[..., :e]` where the values are a part of the keys.
        table_SM: [S, M] int32 pages of each sequence, in order; entries past a sequence's length are not looked at.
        lengths_S: [S] int32 tokens of each sequence, the newest one included; 0 for a place that has no sequence.
        window: how many tokens back a token sees, itself included; None: all.
        scale: what scores are multiplied with; None: 1 / sqrt(d).

    Returns:
        [S, H, e] in q's dtype, accumulated in float32 at least; zeros where the length is 0.

    Raises:
        ValueError: if shapes or dtypes do not fit, or the window is not positive.
    """
    _check(q_SHd, keys_PBGd, values_PBGe, table_SM, len(q_SHd), window)
    scale = 1 / math.sqrt(q_SHd.shape[2]) if scale is None else scale
    return _paged_attention(q_SHd, keys_PBGd, values_PBGe, table_SM, lengths_S, window, scale)


def paged_attention_ref(
    q_SHd: torch.Tensor,
    keys_PBGd: torch.Tensor,
    values_PBGe: torch.Tensor,
    table_SM: torch.Tensor,
    lengths_S: torch.Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The definition of `paged_attention`: each head of each sequence by itself, position after position."""
    (S, H, d), (_, size, G, _) = q_SHd.shape, keys_PBGd.shape
    o_SHe = q_SHd.new_zeros(S, H, values_PBGe.shape[3])
    for s, length in enumerate(lengths_S.tolist()):
        positions_C = torch.arange(0 if window is None else max(0, length - window), length)
        pages_C, places_C = table_SM[s, positions_C // size], positions_C % size
        for h in range(H if length else 0):
            keys_Cd, values_Ce = (cache[pages_C, places_C, h // (H // G)] for cache in (keys_PBGd, values_PBGe))
            scores_C = (keys_Cd @ q_SHd[s, h]) * (1 / math.sqrt(d) if scale is None else scale)
            o_SHe[s, h] = scores_C.softmax(0) @ values_Ce
    return o_SHe


def paged_prefill(
    q_THd: torch.Tensor,
    keys_PBGd: torch.Tensor,
    values_PBGe: torch.Tensor,
    table_SM: torch.Tensor,
    lengths: Sequence[int],
    queries: Sequence[int],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Answer the newest `queries[s]` tokens of each sequence s, each from itself and what came before it.

    Args:
        q_THd: [T, H, d] the sequences' new tokens one after the other; T is the sum of `queries`.
        lengths: S numbers of the host (shapes hang on them): tokens of each sequence, the new ones included.
        queries: S numbers of the host: how many of them are new, from 0 to the length.
        keys_PBGd, values_PBGe, table_SM, window, scale: as in `paged_attention`.

    Returns:
        [T, H, e] in q's dtype.

    Raises:
        ValueError: as `paged_attention`, or if `queries` do not add up to T or are more than the length.
    """
    _check(q_THd, keys_PBGd, values_PBGe, table_SM, len(lengths), window)
    if sum(queries) != len(q_THd) or any(new > length for new, length in zip(queries, lengths, strict=True)):
        raise ValueError(f"queries {list(queries)} of sequences of {list(lengths)} tokens do not fit {len(q_THd)} rows")
    o_THe = q_THd.new_empty(*q_THd.shape[:2], values_PBGe.shape[3])
    done = 0
    for s, (length, new) in enumerate(zip(lengths, queries, strict=True)):
        if new:
            # The first new token sees furthest back.
            first = 0 if window is None else max(0, length - new + 1 - window)
            keys_GCd = gather_pages(keys_PBGd, table_SM[s], first, length)
            values_GCe = gather_pages(values_PBGe, table_SM[s], first, length)
            q_HNd = q_THd[done : done + new].transpose(0, 1)
            causal = new == length - first and new > 1 and (window is None or new <= window)  # so no mask is made
            mask_NC = None if causal or new == 1 else _causal(new, length - first, window, q_THd.device)
            o_HNe = functional.scaled_dot_product_attention(
                *(q_HNd[None], keys_GCd[None], values_GCe[None], mask_NC),
                **{"is_causal": causal, "scale": scale, "enable_gqa": True},
            )[0]
            o_THe[done : done + new] = o_HNe.transpose(0, 1)
            done += new
    return o_THe


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [queries, keys]: the last query stands at the last key."""
    visible_NC = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return visible_NC if window is None else visible_NC.triu(keys - queries - window + 1)


def paged_prefill_ref(
    q_THd: torch.Tensor,
    keys_PBGd: torch.Tensor,
    values_PBGe: torch.Tensor,
    table_SM: torch.Tensor,
    lengths: Sequence[int],
    queries: Sequence[int],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The definition of `paged_prefill`: each new token as if its sequence ended there."""
    spans = list(zip(range(len(lengths)), lengths, queries, strict=True))
    sequence_T = [s for s, _, new in spans for _ in range(new)]
    lengths_T = torch.tensor([length - new + i + 1 for _, length, new in spans for i in range(new)], dtype=torch.int32)
    table_TM = table_SM[torch.tensor(sequence_T, dtype=torch.int64)]
    return paged_attention_ref(q_THd, keys_PBGd, values_PBGe, table_TM, lengths_T, window=window, scale=scale)
