"""What a pool asks of a cluster, and what is said where it cannot have it; tests/test_lost_nodes.py has real nodes."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.launch import ray_cluster
from expertmesh.launch.ray_cluster import Wanted, told_of, watched_head


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


@pytest.mark.parametrize("speaks", [True, False], ids=["at work", "stopped"])
def test_a_head_that_takes_connections_and_says_nothing_is_lost(monkeypatch, speaks):
    """As one that is stopped, for which the system takes them."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        context = SimpleNamespace(gcs_address=address)
        monkeypatch.setattr(ray_cluster.ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(ray_cluster, "LOOK_EVERY_S", 0.05)
        told: list[str] = []
        over = threading.Event()

        def lost(why: str) -> None:
            told.append(why)
            over.set()

        def speak() -> None:
            for _ in range(8):
                line, _ = head.accept()
                with line:
                    line.sendall(b"SETTINGS")
            over.set()

        if speaks:
            threading.Thread(target=speak, daemon=True).start()
        with watched_head(0.2 if not speaks else 60, lost):
            assert over.wait(30)
        assert told == ([] if speaks else [f"the head of the Ray cluster, {address}, has not answered for 0.2 s"])
