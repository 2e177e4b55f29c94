"""Workers of a real service are killed and stopped while it answers: every text is what it is without that."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from serving import processes_of, requests, streamed
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.launch.pools import Pools
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


@pytest.mark.parametrize("pools", [Pools(1, 2)], ids=["1:2"])
def test_texts_outlive_workers(tmp_path: Path, pools: Pools) -> None:
    """In a process of its own: Ray keeps what another test's cluster made of its settings, such as a token."""
    prepare_tiny_data(tmp_path)
    checkpoint = write_random_checkpoint(tmp_path, tiny_model())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(serve_and_strike, checkpoint, pools).result()
