"""The parts of a hop; whole hops are tested as dispatchers (test_dispatchers.py)."""

from __future__ import annotations

import pytest
import torch

from expertmesh.parallel.hops import Decided, Destinations, Here, chunk_sizes, packed
from expertmesh.parallel.placement import expert_shard


@pytest.mark.parametrize(
    "tokens, chunks, sizes",
    [(6, 3, [2, 2, 2]), (7, 3, [3, 3, 1]), (4, 3, [2, 2, 0]), (1, 3, [1, 0, 0]), (0, 2, [0, 0]), (5, 1, [5])],
)
def test_chunks(tokens, chunks, sizes):
    assert chunk_sizes(tokens, -(-tokens // chunks), chunks) == sizes


@pytest.mark.parametrize("experts", [0, 1, 3, 4, 7, 8, 64])
@pytest.mark.parametrize("nodes, per_node", [(1, 4), (2, 2), (2, 4), (4, 1)])
def test_what_lies_behind_a_node_is_what_its_ranks_hold(experts, nodes, per_node):
    ranks = nodes * per_node
    behind = Destinations(tuple(range(0, ranks + 1, per_node)), ranks).bounds(experts)
    for node in range(nodes):
        first = node * per_node
        inside = Destinations(tuple(range(first, first + per_node + 1)), ranks).bounds(experts)
        assert (inside[0], inside[-1]) == (behind[node], behind[node + 1])
        for place in range(per_node):
            assert range(inside[place], inside[place + 1]) == expert_shard(experts, first + place, ranks)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_choices_survive_the_wire(rows, top_k):
    generator = torch.Generator().manual_seed(1)
    weights_TK = torch.rand(rows, top_k, generator=generator)
    weights_TK[:1, 0] = float("nan")  # bits, not numbers
    experts_TK = torch.randint(0, 300, (rows, top_k), generator=generator)
    origin_T = torch.randint(0, 9, (rows,), generator=generator)
    source_V = torch.arange(rows) % 3
    decided = Decided()
    back_TK = decided.read(packed(weights_TK, experts_TK, origin_T), source_V, 3)
    assert torch.equal(back_TK.view(torch.int32), weights_TK.view(torch.int32))
    assert torch.equal(decided.experts_VK, experts_TK)
    assert torch.equal(decided.origin_V, origin_T * 3 + source_V)


def test_what_is_here_needs_no_exchange():
    rows_VD = torch.ones(2, 3)
    here = Here(rows_VD)
    here.start(torch.zeros(7, 3))
    assert here.finish() is rows_VD
