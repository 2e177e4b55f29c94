"""Which ranks of a group share a node, and so a fast link; the others are far.

Only one layout counts as nodes: the same number of ranks on each, one node's ranks following one another. That is what
launchers make. Ranks that lie otherwise are taken for nodes of one rank each, and all their traffic for far.
"""

from __future__ import annotations

import hashlib
import socket
from typing import NamedTuple

import torch
import torch.distributed as dist


class Nodes(NamedTuple):
    """How the ranks of a group lie on nodes. A group is None where it would hold this rank alone."""

    ranks_per_node: int
    inside: dist.ProcessGroup | None = None  # the ranks of this node
    between: dist.ProcessGroup | None = None  # the ranks that have this one's place in their nodes, in node order


def find_ranks_per_node(group: dist.ProcessGroup, device: str) -> int:
    """By the name of the host that each rank runs on. All ranks of the group call it."""
    name = hashlib.sha256(socket.gethostname().encode()).digest()[:8]
    mine = torch.tensor([int.from_bytes(name, "little", signed=True)], device=device)
    hosts = torch.empty(group.size(), dtype=mine.dtype, device=device)
    dist.all_gather_single(hosts, mine, group=group)
    return equal_runs(hosts.tolist())


def equal_runs(hosts: list[int]) -> int:
    """The length of the runs of equal neighbours, if all have one length and no host has two; else 1."""
    length = hosts.count(hosts[0])
    runs = [hosts[start : start + length] for start in range(0, len(hosts), length)]
    whole = all(run.count(run[0]) == len(run) == length for run in runs)
    return length if whole and len({run[0] for run in runs}) == len(runs) else 1


def far_ranks(group: dist.ProcessGroup, ranks_per_node: int) -> tuple[bool, ...]:
    """Of each rank of `group`, whether it is on another node than this one."""
    return tuple(rank // ranks_per_node != group.rank() // ranks_per_node for rank in range(group.size()))


def split_by_node(group: dist.ProcessGroup, ranks_per_node: int) -> Nodes:
    """Make the groups inside nodes and between them. All ranks of `group` call it, and only they."""
    assert group.size() % ranks_per_node == 0, f"{group.size()} ranks, {ranks_per_node} a node"
    ranks = dist.get_process_group_ranks(group)
    node, place = divmod(group.rank(), ranks_per_node)
    inside = ranks[node * ranks_per_node : (node + 1) * ranks_per_node]
    return Nodes(ranks_per_node, _unless_alone(inside), _unless_alone(ranks[place::ranks_per_node]))


def _unless_alone(ranks: list[int]) -> dist.ProcessGroup | None:
    return dist.new_group(ranks, use_local_synchronization=True) if len(ranks) > 1 else None
