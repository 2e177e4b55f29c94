"""Which rank holds which expert. Today: equal contiguous blocks, in rank order, uneven by one where they must be."""

from __future__ import annotations


def expert_shard(num_experts: int, rank: int, size: int) -> range:
    """The experts that rank `rank` of `size` holds: a contiguous range of [0, num_experts), possibly empty."""
    return range(num_experts * rank // size, num_experts * (rank + 1) // size)


def shard_sizes(num_experts: int, size: int) -> list[int]:
    """How many experts each of `size` ranks holds, in rank order."""
    return [len(expert_shard(num_experts, rank, size)) for rank in range(size)]


def largest_shard(num_experts: int, size: int) -> int:
    """The most experts that any of `size` ranks holds of a layer with up to `num_experts`."""
    return -(-num_experts // size)
