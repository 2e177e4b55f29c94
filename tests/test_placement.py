"""Every expert is on one rank, in order, and no rank holds two more than another."""

from __future__ import annotations

import pytest

from expertmesh.parallel.placement import expert_shard, shard_sizes

CASES = [
    (8, 1, [8], "one rank holds all"),
    (8, 4, [2, 2, 2, 2], "even"),
    (8, 3, [2, 3, 3], "uneven by one"),
    (3, 5, [0, 1, 0, 1, 1], "fewer experts than ranks: some hold none"),
    (0, 2, [0, 0], "no experts"),
    (160, 7, [22, 23, 23, 23, 23, 23, 23], "a large layer"),
]


@pytest.mark.parametrize("experts, size, sizes, reason", CASES, ids=[reason for *_, reason in CASES])
def test_shards_share_out_all_experts_in_order(experts, size, sizes, reason):
    shards = [expert_shard(experts, rank, size) for rank in range(size)]
    assert [expert for shard in shards for expert in shard] == list(range(experts))
    assert shard_sizes(experts, size) == [len(shard) for shard in shards] == sizes
