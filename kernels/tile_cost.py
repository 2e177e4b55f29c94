"""What a product's tiles move and compute, against the least that any schedule could: the price of the tiles chosen.

A program reads its tile's part of both operands for the whole inner width and writes its tile once. So the bytes below
are those asked of the cache; what the cache already holds (`swizzle` sees to that) main memory is not asked for again.
Rows past the end of a group are computed and thrown away: a tile of 128 rows for a group of 5 does 26 times the work.

    counts_E = [3, 0, 5], tiles of 4 x 128, N = 128, K = 64, 2 bytes a number
    3 tiles of rows in 1 block of columns:  flops 3 * 2*4*128*64 of 8 * 2*128*64 needed, so 1.5 times

Legend: R rows, E experts, K inner width, N output width.
"""

from __future__ import annotations

from typing import NamedTuple

from expertmesh.kernels.paged_attention_triton import part_span
from expertmesh.kernels.tiles import Cut, Tile


class Cost(NamedTuple):
    """Of one launch."""

    bytes: int
    least_bytes: int  # each operand read once, the result written once
    flops: int
    least_flops: int

    @property
    def bytes_ratio(self) -> float:
        return self.bytes / max(self.least_bytes, 1)

    @property
    def flops_ratio(self) -> float:
        return self.flops / max(self.least_flops, 1)


def multiply_cost(counts: list[int], n: int, k: int, itemsize: int, tile: Tile, accumulators: int = 1) -> Cost:
    """Of `multiply` (and with 2 accumulators of the up projection: `n` units with two weights each, one number out)."""
    rows, used = sum(counts), sum(1 for count in counts if count)
    tiles = sum(-(-count // tile.rows) for count in counts)
    blocks, depth = -(-n // tile.columns), -(-k // tile.depth) * tile.depth
    weights = accumulators * k * itemsize
    read = tiles * blocks * (tile.rows * k * itemsize + tile.columns * weights)
    return Cost(
        bytes=read + rows * n * itemsize,
        least_bytes=rows * k * itemsize + used * n * weights + rows * n * itemsize,
        flops=2 * tiles * blocks * accumulators * tile.rows * tile.columns * depth,
        least_flops=2 * rows * n * k * accumulators,
    )


def few_rows_cost(counts: list[int], n: int, k: int, itemsize: int, cut: Cut, accumulators: int = 1) -> Cost:
    """Of the same products where rows are few: a tile fetches the rows that there are, parts go through memory."""
    rows, used = sum(counts), sum(1 for count in counts if count)
    blocks = -(-n // cut.tile.columns)
    weights, out = accumulators * k * itemsize, rows * n * itemsize
    between = 2 * cut.parts * rows * accumulators * n * 4 if cut.parts > 1 else 0
    return Cost(
        bytes=blocks * (rows * k * itemsize + used * cut.tile.columns * weights) + between + out,
        least_bytes=rows * k * itemsize + used * n * weights + out,
        flops=2 * used * blocks * accumulators * cut.tile.rows * cut.tile.columns * k,
        least_flops=2 * rows * n * k * accumulators,
    )


def outer_cost(counts: list[int], n: int, k: int, itemsize: int, tile: Tile) -> Cost:
    """Of `outer`: every block of every expert's result reads all rows of that expert, of a part of both widths."""
    rows, experts = sum(counts), len(counts)
    n_blocks, k_blocks = -(-n // tile.rows), -(-k // tile.columns)
    steps = sum(-(-count // tile.depth) for count in counts)
    written = experts * n * k * itemsize
    return Cost(
        bytes=(k_blocks * n + n_blocks * k) * rows * itemsize + written,
        least_bytes=rows * (n + k) * itemsize + written,
        flops=2 * n_blocks * k_blocks * tile.rows * tile.columns * tile.depth * steps,
        least_flops=2 * rows * n * k,
    )


def paged_attention_cost(
    lengths: list[int], heads: int, groups: int, d: int, e: int, shared: bool, itemsize: int, tile: Tile, parts: int
) -> Cost:
    """Of `paged_attention` without a window: each block of the heads of a key-value head reads that head's positions.

    Left out: the table of pages, 4 bytes of each page a block.
    """
    per_group = heads // groups
    blocks = groups * -(-per_group // tile.rows)
    position, answer = (d + (0 if shared else e)) * itemsize, heads * e * itemsize
    cost = Cost(0, 0, 0, 0)
    for length in lengths:
        span = part_span(length, parts, tile.depth)
        used = -(-length // span)
        steps = sum(-(-min(span, length - first) // tile.depth) for first in range(0, length, span))
        between = 2 * used * heads * (e + 1) * 4 if parts > 1 else 0  # written, and read by the kernel that joins
        cost = Cost(
            bytes=cost.bytes + blocks * length * position + used * heads * d * itemsize + between + answer,
            least_bytes=cost.least_bytes + groups * length * position + heads * d * itemsize + answer,
            flops=cost.flops + 2 * blocks * steps * tile.rows * tile.depth * (d + e),
            least_flops=cost.least_flops + 2 * heads * length * (d + e),
        )
    return cost
