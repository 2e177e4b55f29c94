"""Workers of a real service are killed and stopped while it answers: every text is what it is without that."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from serving import processes_of, requests, streamed
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.launch import ray_cluster
from expertmesh.launch.pools import Pools
from expertmesh.launch.ray_cluster import LOOK_EVERY_S, Pool
from expertmesh.launch.serving import bring_up, look_at
from expertmesh.system.serve.config import ServeConfig

FAULTS = [
    ("FFNRole", signal.SIGKILL),
    ("AttentionRole", signal.SIGKILL),
    ("FFNRole", signal.SIGSTOP),
    ("AttentionRole", signal.SIGSTOP),
]


def strike(role: str, how: signal.Signals) -> Callable[[], Awaitable[None]]:
    async def meanwhile() -> None:
        os.kill(processes_of(role)[0], how)

    return meanwhile


async def outlive(checkpoint: Path, pools: Pools) -> None:
    async with bring_up(
        look_at(checkpoint), pools, ServeConfig(exchange_timeout_s=2.0, micro_batch_tokens=1)
    ) as service:
        client = service.client
        whole = await streamed(client, requests())
        for fault in FAULTS:
            assert await streamed(client, requests(), strike(*fault)) == whole, fault
        counts = await client.counts()
        assert not any(one.pages_used for one in counts), "a page was lost"
        assert {len(processes_of(role)) for role in ("FFNRole", "AttentionRole")} == set(pools)


def serve_and_strike(checkpoint: Path, pools: Pools) -> None:
    asyncio.run(asyncio.wait_for(outlive(checkpoint, pools), 240))
    assert not processes_of("FFNRole") and not processes_of("AttentionRole")


async def end_while_one_starts(checkpoint: Path) -> None:
    """Leave a service while the next worker is awaited in the place of one that was killed."""
    awaited, over, await_started = threading.Event(), threading.Event(), Pool.await_started

    def noticed(pool: Pool, ranks: Sequence[int]) -> None:
        awaited.set()
        try:
            await_started(pool, ranks)
        finally:
            over.set()

    Pool.await_started = noticed
    async with bring_up(look_at(checkpoint), Pools(2, 1), ServeConfig()):
        os.kill(processes_of("FFNRole")[0], signal.SIGKILL)
        while not awaited.is_set():
            await asyncio.sleep(0.01)
        end_ray = ray_cluster.ray.shutdown

        def shutdown() -> None:
            assert over.wait(LOOK_EVERY_S / 4), "Ray ends below a thread that waits: that may never return"
            end_ray()

        ray_cluster.ray.shutdown = shutdown


def serve_and_end(checkpoint: Path) -> None:
    asyncio.run(end_while_one_starts(checkpoint))


def in_its_own_process(what: Callable[..., None], folder: Path, *arguments: object) -> None:
    """Ray keeps what another test's cluster made of its settings, such as a token."""
    prepare_tiny_data(folder)
    checkpoint = write_random_checkpoint(folder, tiny_model())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(what, checkpoint, *arguments).result()


@pytest.mark.parametrize("pools", [Pools(1, 2)], ids=["1:2"])
def test_texts_outlive_workers(tmp_path: Path, pools: Pools) -> None:
    in_its_own_process(serve_and_strike, tmp_path, pools)


def test_a_service_ends_while_a_worker_starts(tmp_path: Path) -> None:
    in_its_own_process(serve_and_end, tmp_path)
