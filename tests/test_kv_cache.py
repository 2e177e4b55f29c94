"""Attention over the cache, in bites of any size and any company, equals attention over whole sequences."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close
from tiny import tiny_model

from expertmesh.system.model.attend import CausalAttend, Look
from expertmesh.system.serve.kv_cache import CacheAttend, KVCache, Span

CONFIG = tiny_model(context_length=16)
HEADS, GROUPS, WIDTH = CONFIG.attention.heads, CONFIG.attention.kv_heads, CONFIG.attention.head_dim


class Case(NamedTuple):
    steps: list[list[Span]]
    reason: str


CASES = [
    Case([[Span(0, 0, 7)]], "one prompt"),
    Case([[Span(1, 0, 3)], [Span(1, 3, 1)], [Span(1, 4, 1)]], "a prompt, then token by token"),
    Case([[Span(2, 0, 1)]] + [[Span(2, i, 1)] for i in range(1, 5)], "a prompt of one token"),
    Case([[Span(0, 0, 4)], [Span(0, 4, 3)], [Span(0, 7, 2)]], "a prompt in bites"),
    Case([[Span(2, 0, 5), Span(0, 0, 2)], [Span(0, 2, 1), Span(2, 5, 1)]], "company, in another order"),
    Case([[Span(0, 0, 3)], [Span(0, 3, 1), Span(1, 0, 6), Span(2, 0, 1)]], "a prompt beside single tokens"),
    Case([[Span(1, 0, 15)], [Span(1, 15, 1)]], "the whole context"),
    Case([[]], "nobody"),
]


def sequences(layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a whole sequence of the context's length."""
    generator = torch.Generator().manual_seed(10 * layer + slot)
    shapes = ((16, HEADS, WIDTH), (16, GROUPS, WIDTH), (16, GROUPS, WIDTH))
    q_SHd, k_SGd, v_SGd = (torch.randn(shape, generator=generator) for shape in shapes)
    return q_SHd, k_SGd, v_SGd


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_equals_causal_attention(case):
    cache = KVCache(CONFIG, slots=3, device="cpu")
    # What other requests left behind must not be seen.
    cache.keys_LXGCd.fill_(torch.nan)
    cache.values_LXGCe.fill_(torch.nan)
    for spans in case.steps:
        attend = CacheAttend(cache, spans)
        for layer in range(CONFIG.layers):
            whole = {span: sequences(layer, span.slot) for span in spans}
            q_THd, k_TGd, v_TGd = (
                torch.cat([first, *(whole[s][i][s.start : s.start + s.length] for s in spans)])
                for i, first in enumerate(t[:0] for t in sequences(layer, 0))
            )
            answers = attend(layer, q_THd, k_TGd, v_TGd, Look()).split([span.length for span in spans])
            for span, answer in zip(spans, answers, strict=bool(spans)):
                end = span.start + span.length
                expected = CausalAttend(end)(layer, *(t[:end] for t in whole[span]), Look())
                assert_close(answer, expected[span.start :], what=f"layer {layer}, {span}")
    used = {(s.slot, p) for spans in case.steps for s in spans for p in range(s.start, s.start + s.length)}
    written = cache.keys_LXGCd.isfinite().all(dim=-1)
    for slot in range(3):
        for position in range(16):
            assert bool(written[:, slot, :, position].all()) == ((slot, position) in used)
            assert bool(written[:, slot, :, position].any()) == ((slot, position) in used)
