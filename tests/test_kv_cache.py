"""Attention over the cache, in bites of any size and any company, equals attention over whole sequences."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from bites import SEQUENCES, Bite, attend_of, cache_for, positions_of
from numerics import assert_close
from tiny import tiny_model

from expertmesh.system.model.attend import CausalAttend, Look
from expertmesh.system.model.attention_config import MLAConfig
from expertmesh.system.serve.kv_cache import pages_for

CONFIG = tiny_model(context_length=16)
HEADS, GROUPS, WIDTH = CONFIG.attention.heads, CONFIG.attention.kv_heads, CONFIG.attention.head_dim


class Case(NamedTuple):
    steps: list[list[Bite]]
    reason: str


CASES = [
    Case([[Bite(0, 0, 7)]], "one prompt"),
    Case([[Bite(1, 0, 3)], [Bite(1, 3, 1)], [Bite(1, 4, 1)]], "a prompt, then token by token"),
    Case([[Bite(2, 0, 1)]] + [[Bite(2, i, 1)] for i in range(1, 5)], "a prompt of one token"),
    Case([[Bite(0, 0, 4)], [Bite(0, 4, 3)], [Bite(0, 7, 2)]], "a prompt in bites"),
    Case([[Bite(2, 0, 5), Bite(0, 0, 2)], [Bite(0, 2, 1), Bite(2, 5, 1)]], "company, in another order"),
    Case([[Bite(0, 0, 3)], [Bite(0, 3, 1), Bite(2, 0, 1), Bite(1, 0, 6)]], "a prompt beside single tokens"),
    Case([[Bite(1, 0, 15)], [Bite(1, 15, 1)]], "the whole context"),
    Case([[]], "nobody"),
]


def sequences(layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a whole sequence of the context's length."""
    generator = torch.Generator().manual_seed(10 * layer + slot)
    shapes = ((16, HEADS, WIDTH), (16, GROUPS, WIDTH), (16, GROUPS, WIDTH))
    q_SHd, k_SGd, v_SGd = (torch.randn(shape, generator=generator) for shape in shapes)
    return q_SHd, k_SGd, v_SGd


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_equals_causal_attention(case, window):
    cache, look = cache_for(CONFIG), Look(window)
    # What other requests left behind must not be seen.
    cache.keys_LPBGd.fill_(torch.nan)
    cache.values_LPBGe.fill_(torch.nan)
    for bites in case.steps:
        attend = attend_of(cache, bites)
        for layer in range(CONFIG.layers):
            whole = {bite: sequences(layer, bite.slot) for bite in bites}
            q_THd, k_TGd, v_TGd = (
                torch.cat([first, *(whole[b][i][b.place] for b in bites)])
                for i, first in enumerate(t[:0] for t in sequences(layer, 0))
            )
            answers = attend(layer, q_THd, k_TGd, v_TGd, look).split([bite.length for bite in bites])
            for bite, answer in zip(bites, answers, strict=bool(bites)):
                end = bite.place.stop
                expected = CausalAttend(end)(layer, *(t[:end] for t in whole[bite]), look)
                assert_close(answer, expected[bite.start :], what=f"layer {layer}, {bite}")
    used = {(b.slot, p) for bites in case.steps for b in bites for p in range(b.start, b.start + b.length)}
    written = cache.keys_LPBGd.isfinite().all(dim=-1)
    for slot in range(SEQUENCES):
        for position, (page, offset) in enumerate(positions_of(slot, 16)):
            assert bool(written[:, page, offset].all()) == ((slot, position) in used)
            assert bool(written[:, page, offset].any()) == ((slot, position) in used)


def test_single_tokens_come_first():
    with pytest.raises(AssertionError, match="come first"):
        attend_of(cache_for(CONFIG), [Bite(0, 0, 2), Bite(1, 0, 1)])


def test_a_copied_page_is_the_page():
    config = tiny_model(moe={"gating_residual": False}, depth={"layers": [0]})
    cache = cache_for(config)
    for paged in (cache.keys_LPBGd, cache.values_LPBGe):
        paged.copy_(torch.randn(paged.shape))
    cache.seen_LPB[:, 3] = True
    keys, values = cache.keys_LPBGd.clone(), cache.values_LPBGe.clone()
    cache.copy(3, 5)
    assert torch.equal(cache.keys_LPBGd[:, 5], keys[:, 3]) and torch.equal(cache.values_LPBGe[:, 5], values[:, 3])
    assert cache.seen_LPB[:, 5].all() and not cache.seen_LPB[:, 4].any()
    keys[:, 5], values[:, 5] = keys[:, 3], values[:, 3]
    assert torch.equal(cache.keys_LPBGd, keys) and torch.equal(cache.values_LPBGe, values), "and nothing else changed"


def test_how_many_pages(monkeypatch):
    """A page of 4 tokens: 3 layers, keys and values of 2 heads of 8 float32 numbers: 1536 bytes."""
    free = {"SC_AVPHYS_PAGES": 4 * 1536 * 10, "SC_PAGE_SIZE": 1}  # a quarter of it is used: room for ten
    monkeypatch.setattr("os.sysconf", free.__getitem__)
    config = tiny_model(context_length=17)
    assert pages_for(config, 4, 9, "cpu", torch.float32) == 3, "what was asked for, rounded up"
    assert pages_for(config, 4, 1000, "cpu", torch.float32) == 10, "no more than there is room for"
    assert pages_for(config, 4, 1000, "cpu", torch.bfloat16) == 20
    with pytest.raises(ValueError, match="one request of 41 tokens takes 16896 bytes, cpu has room for 15360"):
        pages_for(tiny_model(context_length=41), 4, 1000, "cpu", torch.float32)
    assert pages_for(tiny_model(context_length=41), 4, 20, "cpu", torch.float32) == 5, "less than a context, as asked"


def test_a_latent_vector_is_kept_once():
    """MLA keeps 12 + 4 numbers a token and layer for all heads, and its values are no tensor of their own."""
    mla = {"kind": "mla", "heads": 4, "kv_rank": 12, "nope_head_dim": 8, "rope_head_dim": 4, "value_head_dim": 6}
    config = tiny_model().model_copy(update={"attention": MLAConfig(**mla)})
    cache = cache_for(config)
    assert cache.keys_LPBGd.shape[2:] == (2, 1, 16) and cache.values_LPBGe.shape[2:] == (2, 1, 12)
    assert cache.values_LPBGe.data_ptr() == cache.keys_LPBGd.data_ptr()
    assert pages_for(config, 4, 64, "cpu", torch.float32) == 16
    cache.keys_LPBGd.copy_(torch.randn(cache.keys_LPBGd.shape))
    page = cache.keys_LPBGd[:, 1].clone()
    cache.copy(1, 0)
    assert torch.equal(cache.keys_LPBGd[:, 0], page) and torch.equal(cache.keys_LPBGd[:, 1], page)
