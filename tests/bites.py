"""Bites of a few sequences whose pages lie between each other's, for tests of attention over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from expertmesh.system.model.config import ModelConfig
from expertmesh.system.serve.kv_cache import KVCache, PagedAttend, Span, plan

SEQUENCES, PAGE = 3, 2


class Bite(NamedTuple):
    """`length` tokens of sequence `slot`, the first at position `start`."""

    slot: int
    start: int
    length: int

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + self.length)


def cache_for(config: ModelConfig) -> KVCache:
    """Room for three sequences of the whole context."""
    return KVCache(config, SEQUENCES * (-(-config.context_length // PAGE) + 1), PAGE, "cpu")


def pages_of(slot: int, tokens: int) -> list[int]:
    """Page i of a sequence lies i rows down, in a column that moves on with i."""
    return [SEQUENCES * i + (slot + i) % SEQUENCES for i in range(-(-tokens // PAGE))]


def attend_of(cache: KVCache, bites: Sequence[Bite]) -> PagedAttend:
    """Those of one token must come first."""
    spans = [Span(pages_of(slot, start + n + 1), start, n) for slot, start, n in bites]
    return PagedAttend(cache, plan(cache, spans))


def positions_of(slot: int, tokens: int) -> list[tuple[int, int]]:
    """(page, offset) of each position."""
    pages = pages_of(slot, tokens)
    return [(pages[position // PAGE], position % PAGE) for position in range(tokens)]
