"""What is known of a cluster on this host; tests/test_submit.py starts one, trains on it and ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import await_end

from expertmesh.launch import local_cluster


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(local_cluster, "folder", lambda: tmp_path)
    return tmp_path


STATES = [
    (None, "never started"),
    ("{", "its state was torn by a kill"),
    (json.dumps({"nodes": [2**22 + 1], "address": "a", "dashboard": "d"}), "its processes are gone"),
    (json.dumps({"nodes": [os.getpid()], "address": "a", "dashboard": "d"}), "their numbers are others' by now"),
]


@pytest.mark.parametrize("state, reason", STATES, ids=[reason for _, reason in STATES])
def test_no_cluster_is_up(here, state, reason):
    if state is not None:
        (here / "state.json").write_text(state)
    assert local_cluster.find() is None
    assert local_cluster.down() is False and not here.exists(), "what it left is cleared away"


def test_one_that_does_not_start_says_why_and_leaves_nothing(here, monkeypatch):
    started: list[int] = []
    real = local_cluster._start

    def start(cpus: int, ports: dict, more: dict, head: bool = False) -> int:
        started.append(real(cpus, ports, {**more, "no-such-option": 1}, head))
        return started[-1]

    monkeypatch.setattr(local_cluster, "_start", start)
    with pytest.raises(RuntimeError, match="the head did not start: .*no.such.option"):
        local_cluster.up(2, 1)
    assert not here.exists() and not local_cluster._is_ray(started[0])


def test_a_node_that_ended_before_it_came_is_started_again(here, monkeypatch):
    """Ray gives it 30 s, which a busy machine may need longer."""

    class Asking:
        def __init__(self, *_: object, **__: object) -> None:
            self.polls = iter((None, 0))

        def poll(self) -> int | None:
            return next(self.polls)

        def kill(self) -> None: ...

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(local_cluster.subprocess, "Popen", Asking)
    monkeypatch.setattr(local_cluster, "_is_ray", lambda pid: pid != 7)
    monkeypatch.setattr(local_cluster, "start_node", lambda number, cpus, address: 10 * number + cpus)
    found = local_cluster.LocalCluster("a", "d", here / "token", [5, 6, 7])
    local_cluster._await_nodes(found, 1, time.monotonic() + 10)
    assert found.nodes == [5, 6, 21] == json.loads((here / "state.json").read_text())["nodes"]


NODE = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, getattr(signal, sys.argv[1]))
print(subprocess.Popen(["sleep", "600"], process_group=0).pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("heeds", [False, True], ids=["that is stopped", "that leaves its agents behind"])
def test_a_node_ends_with_all_of_its_processes(monkeypatch, heeds):
    """Ray puts workers in groups of their own, and its agents outlive a node that ends when told."""
    command = [sys.executable, "-c", NODE, "SIG_DFL" if heeds else "SIG_IGN"]
    node = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    other = psutil.Process(int(node.stdout.readline()))
    for pid in () if heeds else (node.pid, other.pid):
        os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(local_cluster, "DOWN_S", 10 if heeds else 0.5)
    monkeypatch.setattr(local_cluster, "_is_ray", lambda pid: node.poll() is None)
    local_cluster._end([node.pid])
    assert node.wait(10) == -(signal.SIGTERM if heeds else signal.SIGKILL)
    await_end([other], 10)


def test_another_folder_is_another_cluster(tmp_path, monkeypatch):
    monkeypatch.delenv("EXPERTMESH_CLUSTER", raising=False)
    ours = local_cluster.folder()
    monkeypatch.setenv("EXPERTMESH_CLUSTER", str(tmp_path))
    assert local_cluster.folder() == tmp_path != ours


def test_only_its_owner_can_read_the_token(here, monkeypatch):
    def start(*_: object, **__: object) -> int:
        assert (here / "token").stat().st_mode & 0o077 == 0 and here.stat().st_mode & 0o077 == 0
        assert len((here / "token").read_text()) == 64
        raise RuntimeError("far enough")

    monkeypatch.setattr(local_cluster, "_start", start)
    with pytest.raises(RuntimeError, match="far enough"):
        local_cluster.up(2, 1)
