"""Which ranks share a node, from the hosts they run on; and the groups inside nodes and between them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from expertmesh.parallel.nodes import equal_runs, find_ranks_per_node, split_by_node


@pytest.mark.parametrize(
    "hosts, length, reason",
    [
        ([7], 1, "one rank"),
        ([7, 7, 7], 3, "one node"),
        ([7, 7, 8, 8], 2, "two nodes"),
        ([7, 8, 9], 1, "a rank each"),
        ([7, 7, 8], 1, "unlike sizes"),
        ([7, 8, 7, 8], 1, "ranks of a node apart"),
        ([7, 7, 8, 8, 7, 7], 1, "a node in two pieces"),
        ([7, 8, 8, 8], 1, "one rank alone, three together"),
        ([7, 7, 8, 8, 8, 8], 1, "two ranks, then twice as many"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_equal_runs_are_nodes(hosts, length, reason):
    assert equal_runs(hosts) == length


def groups_of_nodes() -> tuple[int, list[float]]:
    rank = dist.get_rank()
    nodes = split_by_node(dist.group.WORLD, 2)
    sums = []
    for group in (nodes.inside, nodes.between):
        total = torch.tensor([10.0**rank])
        dist.all_reduce(total, group=group)
        sums.append(total.item())
    return find_ranks_per_node(dist.group.WORLD, "cpu"), sums


def test_groups_inside_and_between():
    for rank, (here, sums) in enumerate(run_ranks(groups_of_nodes, 4)):
        assert here == 4  # all of this test runs on one host
        assert sums == [11.0 if rank < 2 else 1100.0, 101.0 if rank % 2 == 0 else 1010.0]
