"""What a pool asks of a cluster, and what is said where it cannot have it; tests/test_lost_nodes.py has real nodes."""

from __future__ import annotations

from typing import Any

import pytest

from expertmesh.launch.room import Wanted, told_of
from expertmesh.launch.worker_failed import WorkerFailed


def node(name: str, cpus: float, gpus: float = 0, **labels: str) -> dict[str, Any]:
    resources = {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})
    labels = {"ray.io/node-id": name, **labels}
    return {"NodeID": name, "NodeManagerHostname": name, "Resources": resources, "Labels": labels}


NODES = [node("a", 4), node("b", 3, pool="ffn"), node("c", 5, gpus=2, pool="ffn", zone="1")]

ROOMS = [
    ({"CPU": 1}, {}, "PACK", 12, "anywhere"),
    ({"CPU": 2}, {}, "SPREAD", 5, "a worker is not cut in two"),
    ({"CPU": 1, "GPU": 1}, {}, "PACK", 2, "by what there is least of"),
    ({"CPU": 1}, {"pool": "ffn"}, "PACK", 8, "where the label is"),
    ({"CPU": 1}, {"pool": "ffn", "zone": "1"}, "PACK", 5, "where both are"),
    ({"CPU": 1}, {"pool": "attention"}, "PACK", 0, "where nobody has it"),
    ({"CPU": 4}, {}, "STRICT_SPREAD", 2, "one a node"),
    ({"CPU": 1}, {"pool": "ffn"}, "STRICT_PACK", 5, "all on one"),
    ({"CPU": 1}, {"pool": "attention"}, "STRICT_PACK", 0, "on one that is not there"),
]


@pytest.mark.parametrize("each, where, strategy, room, reason", ROOMS, ids=[row[-1] for row in ROOMS])
def test_room(each, where, strategy, room, reason):
    assert Wanted("ffn", 2, each, where, strategy).places(NODES) == room


def test_what_is_asked_for_and_what_there_is():
    wanted = Wanted("trainer", 2, {"CPU": 1, "GPU": 0.5}, {"pool": "ffn", "zone": "1"}, "STRICT_SPREAD")
    assert str(wanted) == (
        "pool trainer asks for 2 workers of 1 CPU, 0.5 GPU on nodes with pool=ffn, zone=1, each on a node of its own"
    )
    assert str(Wanted("trainer", 2, {"CPU": 1}, {}, "PACK")) == "pool trainer asks for 2 workers of 1 CPU"
    assert told_of(NODES[:2]) == "a has 4 CPU, 0 GPU; b (pool=ffn) has 3 CPU, 0 GPU"
    free = {"c": {"CPU": 1.5}}
    assert told_of(NODES[2:], free) == "c (pool=ffn, zone=1) has 1.5 of 5 CPU free, 0 of 2 GPU free"


def test_no_room_for_spares_is_told_with_a_way_out():
    wanted = Wanted("trainer", 2, {"CPU": 1}, {}, "PACK")
    wanted.check_room([node("a", 2)])
    told = "asks for 2 workers and 1 spares of 1 CPU; the cluster has room for 2: a has 2 CPU, 0 GPU; fault.spares=0"
    with pytest.raises(WorkerFailed, match=told):
        wanted._replace(spares=1).check_room([node("a", 2)])
