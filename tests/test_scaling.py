"""A real service is given other sizes while it answers, also as workers die of it: every text is what it is without."""

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
from expertmesh.launch.split_service import SplitService
from expertmesh.launch.worker_failed import WorkerFailed
from expertmesh.system.serve.config import ServeConfig


def workers() -> Pools:
    return Pools(len(processes_of("AttentionRole")), len(processes_of("FFNRole")))


async def ended(wanted: Pools) -> None:
    """Those that nobody asks any more are gone soon."""
    for _ in range(100):
        if workers() == wanted:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{workers()} are there, not {wanted}")


async def change(checkpoint: Path) -> None:
    config = ServeConfig(exchange_timeout_s=5.0, micro_batch_tokens=1, expert_copies=1)
    async with bring_up(look_at(checkpoint), Pools(1, 1), config) as service:
        client, split = service.client, service.split
        assert split is not None
        whole = await streamed(client, requests())

        def to(wanted: Pools, kill: str | None = None) -> Callable[[], Awaitable[None]]:
            async def meanwhile() -> None:
                before, scaling = split.pools, asyncio.create_task(split.scale(wanted))
                if kill is not None:
                    await asyncio.sleep(0.5)
                    os.kill(processes_of(kill)[0], signal.SIGKILL)
                try:
                    scaled = await scaling
                    assert scaled[:2] == wanted == split.pools and 0 < scaled.longest_pause_s < 60
                except WorkerFailed:  # it was to take up a share of the next pool: there is none then
                    assert kill == "FFNRole" and split.pools.ffn == before.ffn

            return meanwhile

        assert await streamed(client, requests(), to(Pools(2, 2))) == whole
        await ended(Pools(2, 2))
        assert await streamed(client, requests(), to(Pools(2, 3), kill="AttentionRole")) == whole
        await ended(Pools(2, 3))
        assert await streamed(client, requests(), to(Pools(1, 4), kill="FFNRole")) == whole
        await ended(split.pools)
        assert await streamed(client, requests(), to(Pools(1, 2))) == whole
        await ended(Pools(1, 2))
        await move_experts(split)
        await refused(split)
        assert await streamed(client, requests()) == whole
        counts = await client.counts()
        assert not any(one.pages_used for one in counts), "a page was lost"
        told = sum(one.generated_tokens for one in counts)
        assert 5 * 144 <= told <= 6 * 144, (
            "what those counted that are gone stays, but for the last moment before a kill"
        )


async def move_experts(split: SplitService) -> None:
    """As if all load had been of one expert that is only on one worker: it gets a copy. What is even already stays."""
    loads, present = await split.rebalance({}), split.pool
    hot = {
        layer: max((e for e in range(4) if len(placement.slots_of_expert[e]) == 1), key=lambda e: loads[layer][e])
        for layer, placement in present.placements.items()
    }
    before = {layer: [load * (e != hot[layer]) for e, load in enumerate(load_E)] for layer, load_E in loads.items()}
    await split.rebalance(before)
    assert split.pool.number == present.number + 1 and split.pool.workers == 2
    for layer, placement in split.pool.placements.items():
        assert placement.slots == 6 and len(placement.slots_of_expert[hot[layer]]) == 2
    await split.rebalance(before)
    assert split.pool.number == present.number + 1
    await ended(Pools(1, 2))


async def refused(split: SplitService) -> None:
    """More than there are places: nothing has changed."""
    for wanted in (Pools(1, 1000), Pools(1000, 2)):
        with pytest.raises(WorkerFailed, match="asks for .* workers of 1 CPU; the cluster has room for"):
            await split.scale(wanted)
        assert split.pools == Pools(1, 2)
    await ended(Pools(1, 2))


def serve_and_change(checkpoint: Path) -> None:
    asyncio.run(asyncio.wait_for(change(checkpoint), 240))
    assert workers() == Pools(0, 0)


def test_texts_outlive_changes(tmp_path: Path) -> None:
    """In a process of its own: Ray keeps what another test's cluster made of its settings, such as a token."""
    prepare_tiny_data(tmp_path)
    checkpoint = write_random_checkpoint(tmp_path, tiny_model())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(serve_and_change, checkpoint).result()
