"""Bytes and flops of the shipped tiles: by hand, by the table of tiles, and against the least possible."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels import grouped_gemm_triton as kernels
from expertmesh.kernels.grouped_swiglu_triton import swiglu_tile
from expertmesh.kernels.paged_attention_triton import SHIPPED, Heads, attention_tile, parts_for
from expertmesh.kernels.tile_cost import few_rows_cost, multiply_cost, outer_cost, paged_attention_cost
from expertmesh.kernels.tiles import SM_90, Cut, Tile, choose_tile, few_rows_cut, tile_table


def test_the_example():
    cost = multiply_cost([3, 0, 5], 128, 64, 2, Tile(4, 128, 64, 4, 3))
    assert (cost.flops, cost.least_flops) == (3 * 2 * 4 * 128 * 64, 8 * 2 * 128 * 64)
    assert cost.flops_ratio == 1.5
    assert cost.bytes == 3 * (4 + 128) * 64 * 2 + 8 * 128 * 2
    assert cost.least_bytes == 8 * 64 * 2 + 2 * 128 * 64 * 2 + 8 * 128 * 2


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0], [40], [16, 33, 1]], ids=str)
def test_tiles_are_those_of_the_table(counts):
    """The programs that find an expert in the table are the ones that are counted."""
    tile = choose_tile(sum(counts), len(counts), 256, 2, SM_90)
    table_T3 = tile_table(torch.tensor(counts), sum(counts), tile.rows).table_T3
    programs = int((table_T3[:, 0] >= 0).sum()) * -(-256 // tile.columns)
    cost = multiply_cost(counts, 256, 64, 2, tile)
    assert cost.flops == programs * 2 * tile.rows * tile.columns * 64


# Each at its own size: (tokens, experts, top-k, model width, hidden width).
SHAPES = {
    "7B of SonicMoE": (24576, 128, 8, 1536, 256),
    "Qwen3-30B-A3B": (16384, 128, 8, 2048, 768),
    "Mixtral 8x7B": (4096, 8, 2, 4096, 14336),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_training_computes_little_that_nobody_needs(shape):
    tokens, experts, top_k, d, f = shape
    generator = torch.Generator().manual_seed(0)
    choices = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    counts = torch.bincount(choices.flatten(), minlength=experts).tolist()
    rows = tokens * top_k
    costs = {
        "up": multiply_cost(counts, f, d, 2, swiglu_tile(rows, experts, 2, SM_90, 2), accumulators=2),
        "down": multiply_cost(counts, d, f, 2, choose_tile(rows, experts, d, 2, SM_90)),
        "dW1": outer_cost(counts, 2 * f, d, 2, kernels.outer_tile(2, SM_90, True)),
        "dW2": outer_cost(counts, d, f, 2, kernels.outer_tile(2, SM_90, False)),
    }
    for name, cost in costs.items():
        assert 1 <= cost.flops_ratio < 1.1, (name, cost.flops_ratio)
        # A whole tile of 128x256 does 85 flops for each byte that it asks for; half of that over all of a launch.
        assert cost.flops / cost.bytes > 43, (name, cost.flops / cost.bytes)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_reads_the_weights_of_each_active_expert_once(shape, tokens):
    """Few tokens: all that matters is that no weight is read twice, and none of an expert without rows."""
    _, experts, top_k, d, f = shape
    generator = torch.Generator().manual_seed(tokens)
    choices = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    counts, rows = torch.bincount(choices.flatten(), minlength=experts).tolist(), tokens * top_k
    for n, k, accumulators in ((f, d, 2), (d, f, 1)):
        cut = few_rows_cut(rows, experts, n, k, 2, SM_90, accumulators)
        cost = few_rows_cost(counts, n, k, 2, cut, accumulators)
        assert sum(count > 0 for count in counts) * accumulators * n * k * 2 < cost.bytes < 1.1 * cost.least_bytes


def test_few_rows_by_hand():
    """3 rows of two experts, 64 columns in two blocks, 256 inner in two parts: partial sums are written and read."""
    cost = few_rows_cost([2, 0, 1], 64, 256, 2, Cut(Tile(16, 32, 128, 4, 3), 2))
    assert cost.least_bytes == 3 * 256 * 2 + 2 * 64 * 256 * 2 + 3 * 64 * 2
    assert cost.bytes == cost.least_bytes + 3 * 256 * 2 + 2 * 2 * 3 * 64 * 4
    assert (cost.flops, cost.least_flops) == (2 * 2 * 16 * 64 * 256, 2 * 3 * 64 * 256)


def attention_cost(heads: Heads, groups: int, lengths: list[int], capacity: int):
    """As `paged_attention` runs it on an H100, for requests that may grow to `capacity` tokens."""
    _, shared_by, d, e, shared = heads
    tile = attention_tile(shared_by, d, e, 2, shared, SM_90)
    parts = parts_for(len(lengths) * groups * -(-shared_by // tile.rows), capacity, SM_90)
    return paged_attention_cost(lengths, shared_by * groups, groups, d, e, shared, 2, tile, parts)


def test_attention_by_hand():
    """5 and 2 positions of one key-value head of width 16, whole: 2 heads, in a tile of 16 by steps of 4."""
    cost = paged_attention_cost([5, 2], 2, 1, 16, 16, False, 2, Tile(16, 16, 4, 4, 3), parts=1)
    assert cost.least_bytes == cost.bytes == 7 * (16 + 16) * 2 + 2 * 2 * (16 + 16) * 2
    assert cost.least_flops == 2 * 2 * 7 * 32 and cost.flops == 2 * (2 + 1) * 16 * 4 * 32


def test_grouped_queries_and_mfa_read_the_cache_once():
    """8 key-value heads at 32 requests, and Step-3 at its 128 of a chip: 4096 tokens and more, whole and in 2 parts."""
    grouped, mfa, _ = SHIPPED
    lengths = [4096 + 61 * (i % 7) for i in range(128)]
    assert attention_cost(grouped, 8, lengths[:32], 65536).bytes_ratio < 1.01
    assert attention_cost(mfa, 1, lengths, 65536).bytes_ratio < 1.07
    # One request alone is cut in as many parts as keep a chip busy; what they hand on is small beside the cache.
    assert attention_cost(grouped, 8, [32768], 65536).bytes_ratio < 1.1


def test_mla_asks_the_cache_four_times():
    """128 heads do not fit one tile: 4 programs side by side ask for each key, and main memory gives it once."""
    _, _, mla = SHIPPED
    assert 3.8 < attention_cost(mla, 1, [4096] * 128, 65536).bytes_ratio < 4
