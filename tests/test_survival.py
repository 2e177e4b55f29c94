"""Workers of a real service are killed and stopped while it answers: every text is what it is without that."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest
from serving import requests
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.launch.client import Client
from expertmesh.launch.serving import Pools, bring_up, look_at
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


@pytest.mark.parametrize("pools", [Pools(1, 2)], ids=["1:2"])
def test_texts_outlive_workers(tmp_path: Path, pools: Pools) -> None:
    prepare_tiny_data(tmp_path)
    served = look_at(write_random_checkpoint(tmp_path, tiny_model()))
    config = ServeConfig(exchange_timeout_s=2.0)

    async def scenario() -> None:
        async with bring_up(served, pools, config) as client:
            whole = await texts(client, requests())
            for fault in FAULTS:
                assert await texts(client, requests(), fault) == whole, fault
            counts = await client.counts()
            assert [one.pages_used for one in counts] == [0] * pools.attention, "a page was lost"
            assert {len(processes_of(role)) for role in ("FFNRole", "AttentionRole")} == set(pools)

    asyncio.run(asyncio.wait_for(scenario(), 240))
    assert not processes_of("FFNRole") and not processes_of("AttentionRole")
