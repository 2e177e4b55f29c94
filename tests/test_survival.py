"""Workers of a real service are killed and stopped while it answers: every text is what it is without that."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest
from serving import requests
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.launch.client import Client
from expertmesh.launch.pools import Pools
from expertmesh.launch.serving import bring_up, look_at
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.request import Request

FAULTS = [
    ("FFNRole", signal.SIGKILL),
    ("AttentionRole", signal.SIGKILL),
    ("FFNRole", signal.SIGSTOP),
    ("AttentionRole", signal.SIGSTOP),
]


def processes_of(role: str) -> list[int]:
    """Of the Ray that this process started."""
    found = psutil.Process().children(recursive=True)
    return [process.pid for process in found if any(f"ray::{role}" in word for word in process.cmdline())]


async def texts(
    client: Client, wanted: list[Request], fault: tuple[str, signal.Signals] | None = None
) -> list[list[int]]:
    """What is said; the fault comes when every request has three tokens."""
    said: list[list[int]] = [[] for _ in wanted]
    reached = asyncio.Event()

    async def ask(place: int, request: Request) -> None:
        async for output in client.generate(request):
            said[place].append(output.token_id)
            if all(len(text) >= 3 for text in said):
                reached.set()

    asking = [asyncio.create_task(ask(place, request)) for place, request in enumerate(wanted)]
    await reached.wait()
    if fault is not None:
        role, how = fault
        os.kill(processes_of(role)[0], how)
    await asyncio.gather(*asking)
    return said


async def outlive(checkpoint: Path, pools: Pools) -> None:
    async with bring_up(
        look_at(checkpoint), pools, ServeConfig(exchange_timeout_s=2.0, micro_batch_tokens=1)
    ) as service:
        client = service.client
        whole = await texts(client, requests())
        for fault in FAULTS:
            assert await texts(client, requests(), fault) == whole, fault
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
