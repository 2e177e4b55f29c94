"""Bytes and flops of the shipped tiles: by hand, by the table of tiles, and against the least possible."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels import grouped_gemm_triton as kernels
from expertmesh.kernels.grouped_swiglu_triton import swiglu_tile
from expertmesh.kernels.tile_cost import multiply_cost, outer_cost
from expertmesh.kernels.tiles import SM_90, Tile, choose_tile, tile_table


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


def test_decode_reads_the_weights_of_each_expert_once():
    """Few tokens: all that matters is that no weight is read twice, and none of an expert without rows."""
    counts = [1, 0, 3, 0, 2, 0, 0, 1]
    tile = choose_tile(sum(counts), len(counts), 4096, 2, SM_90)
    cost = multiply_cost(counts, 4096, 2048, 2, tile)
    weights = 4 * 4096 * 2048 * 2
    assert weights < cost.bytes < 1.15 * cost.least_bytes
