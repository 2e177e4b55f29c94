"""Leaving a cluster, and losing its head; tests/test_lost_nodes.py has real nodes."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
from ray.exceptions import RaySystemError

from expertmesh.launch import ray_cluster
from expertmesh.launch.ray_cluster import LOOK_EVERY_S, Pool, cluster, gpus_for, watched_head
from expertmesh.launch.worker_failed import WorkerFailed


def wait_and_leave() -> None:
    class Never:
        """A worker that is never there. In here, so that Ray sends it along: workers cannot import a test."""

        def __init__(self, rank: int) -> None:
            threading.Event().wait()

    with cluster(None, 2):
        pool, told = Pool("never", Never, 1, 1), []

        def act(wait: Callable[[], object]) -> None:
            with pytest.raises(WorkerFailed) as failed:
                wait()
            told.append(str(failed.value))

        guest = Pool("guest", Never, 1, 1)
        waits = (lambda: pool.await_started([0]), lambda: pool.grow(1))  # there is room, which the guest has
        waiting = [threading.Thread(target=act, args=[wait], daemon=True) for wait in waits]
        for thread in waiting:
            thread.start()
        time.sleep(2 * LOOK_EVERY_S)
        assert all(thread.is_alive() for thread in waiting)
        pool.wait_no_more()
        for thread in waiting:
            thread.join(1)
        assert not any(thread.is_alive() for thread in waiting)
        act(waits[0])  # one that comes late
        assert told == 3 * ["workers of pool never are waited for no more"]
        guest.stop()
    with pytest.raises(RaySystemError, match="Ray has not been started yet"):  # nor is one for it
        gpus_for(1)


def test_who_leaves_a_cluster_waits_for_nobody():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(wait_and_leave).result()


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
