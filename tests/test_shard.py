"""Marks of split weights: where a part lies, and that parts put together are the whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_threads
from torch import nn

from expertmesh.parallel.shard import WHOLE, Shard, gather_parts, mark, shard_of

CASES = [
    (Shard(0, 1, 2), (4, 3), (8, 3), (slice(4, 8), slice(0, 3)), "outputs of a linear map: its second half"),
    (Shard(1, 2, 3), (4, 2), (4, 6), (slice(0, 4), slice(4, 6)), "inputs: the last third"),
    (Shard(0, 3, 4), (2,), (8,), (slice(6, 8),), "a bias"),
    (WHOLE, (4, 3), (4, 3), (slice(0, 4), slice(0, 3)), "not split"),
    (WHOLE, (), (), (), "a number"),
]


@pytest.mark.parametrize("shard, part, full, place, reason", CASES, ids=[reason for *_, reason in CASES])
def test_where_a_part_lies(shard, part, full, place, reason):
    assert shard.full_shape(part) == full
    assert shard.place(part) == place
    assert torch.empty(full)[shard.place(part)].shape == part


def test_parts_cover_the_whole_once():
    counts = torch.zeros(6, 4)
    for rank in range(3):
        counts[Shard(0, rank, 3).place((2, 4))] += 1
    assert torch.equal(counts, torch.ones(6, 4))


def test_a_parameter_without_a_mark_is_whole():
    parameter = nn.Parameter(torch.empty(2, 2))
    assert shard_of(parameter) == WHOLE
    mark(parameter, Shard(1, 0, 2))
    assert shard_of(parameter) == Shard(1, 0, 2)


@pytest.mark.parametrize("to", [0, 2])
def test_one_rank_gets_all_parts_in_order(to):
    def rank_main(group: dist.ProcessGroup) -> list[torch.Tensor]:
        columns = torch.arange(12.0).view(4, 3)[:, group.rank()]  # not contiguous
        return gather_parts(columns, group, to)

    ranks = run_threads(rank_main, 3)
    assert torch.equal(torch.stack(ranks[to], 1), torch.arange(12.0).view(4, 3))
    assert all(parts == [] for rank, parts in enumerate(ranks) if rank != to)


def test_alone_the_part_is_the_whole():
    (part,) = gather_parts(torch.ones(2), None, 0)
    assert torch.equal(part, torch.ones(2))
