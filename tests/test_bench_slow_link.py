"""The roads of expert rows between emulated nodes: all say the same before they are timed, and their bytes add up."""

from __future__ import annotations

import pytest
import torch

from expertmesh.launch.bench.network import NoNetwork
from expertmesh.launch.bench.slow_link import ROADS, SlowLinkCase, _differs, bench_slow_link
from expertmesh.launch.bench.table import cluster_table

TINY = SlowLinkCase(
    rounds=1, nodes=2, ranks_per_node=2, slow=(0, 1), tokens=48, experts=8, top_k=4, hidden_size=128, ffn_size=16
)


def test_four_ranks_on_two_nodes():
    heard: list[str] = []
    try:
        rows = bench_slow_link(TINY, heard.append)
    except NoNetwork as error:
        pytest.skip(str(error))
    assert heard[0].startswith("network: 2 nodes of 2 ranks, 100 Mbit/s between nodes 0 and 1")
    assert [row["what"] for row in rows] == [road.what for road in ROADS]
    assert all(row["seconds"] > 0 and row["link_bytes"] == {"0-1": row["slow_bytes"]} for row in rows)
    assert all(row["fast_bytes"] == 0 for row in rows), "there is one link"
    # Headers, acknowledgements, and how many rows there will be, which are of no size.
    assert all(row["row_bytes"] < row["slow_bytes"] < 1.1 * row["row_bytes"] + 50_000 for row in rows)
    straight, hierarchical, straight8, hierarchical8, plus, plus_hierarchical, plus8 = (
        row["row_bytes"] for row in rows
    )
    assert hierarchical < straight and hierarchical8 < straight8 and plus_hierarchical < plus
    assert straight8 < 0.4 * straight and plus8 < 0.4 * plus_hierarchical and plus < straight
    assert cluster_table(rows).row_count == len(ROADS)


def test_other_bits_are_seen():
    answers = {"y": torch.ones(2), "router": torch.ones(3)}
    assert _differs(answers, {name: tensor.clone() for name, tensor in answers.items()}) == ""
    off = answers | {"router": torch.tensor([1.0, 1.0, 1.0 + 2**-20])}
    assert _differs(answers, off) == "router has other bits than by the straight road"
