"""What several tests ask of an engine, and its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from threading import Thread

import psutil
import torch
import torch.distributed as dist

from expertmesh.launch.client import Client
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.serve.request import Output, Request, Sampling
from expertmesh.system.serve.workers import AttentionWorker, FFNPool, FFNWorker

Answers = dict[str, list[int]]


def requests() -> list[Request]:
    """Six of 1 to 30 tokens and 24 more; one is drawn, two begin alike."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (1, 2, 7, 19, 30)]
    prompts.append([*prompts[4][:20], 9])
    greedy = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
    drawn = Sampling(max_tokens=24, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True)
    return [Request(f"r{i}", p, drawn if i == 2 else greedy) for i, p in enumerate(prompts)]


def answers(loop: EngineLoop, wanted: list[Request]) -> Answers:
    """The tokens of each; the loop is closed after them."""
    tokens = texts(loop, wanted)
    used = loop.counts().pages_used
    loop.close()
    assert used == 0, f"{used} pages were not given back"
    return tokens


def texts(loop: EngineLoop, wanted: list[Request]) -> Answers:
    """The tokens of each."""
    tokens: Answers = {request.id: [] for request in wanted}
    for request in wanted:
        loop.submit(request)
    open_requests = len(wanted)
    for batch in loop.outputs():
        for output in batch:
            tokens[output.request_id].append(output.token_id)
            open_requests -= output.finish_reason is not None
        if not open_requests:
            return tokens
    raise AssertionError("the engine stopped early")


def steps_to_the_end(engine: Engine, wanted: list[Request]) -> Iterator[list[Output]]:
    """What each step says, from the arrival of all of them until no work is left; then no page is held."""
    for request in wanted:
        engine.add(request)
    while engine.has_work:
        yield engine.step()
    assert engine.counts().pages_used == 0, "a page was lost"


def pools_in_threads(
    checkpoint: Checkpoint, config: ServeConfig, attention: int, ffn: int
) -> tuple[list[EngineLoop], list[Thread]]:
    """The attention workers and the threads of the FFN workers, which end after them; on the links all is as ever.

    Micro-batches of a single token are in flight, too.
    """
    config = config.model_copy(update={"micro_batch_tokens": 1})
    pool, store = FFNPool(ffn), dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    answering = answer_in_threads(checkpoint, config, pool, attention, store)
    return [AttentionWorker(checkpoint, config, rank, pool, store).loop for rank in range(attention)], answering


def split_in_threads(
    checkpoint: Checkpoint, config: ServeConfig, attention: int, ffn: int, wanted: list[Request]
) -> list[Answers]:
    """What each attention worker says; all workers in threads of this process."""
    loops, answering = pools_in_threads(checkpoint, config, attention, ffn)
    said: list[Answers] = [{} for _ in loops]

    def ask(rank: int) -> None:
        said[rank] = answers(loops[rank], wanted)

    askers = [Thread(target=ask, args=(rank,), daemon=True) for rank in range(attention)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(120)
    wait_for_end(answering)
    return said


def answer_in_threads(
    checkpoint: Checkpoint, config: ServeConfig, pool: FFNPool, attention: int, store: dist.Store
) -> list[Thread]:
    """The FFN workers of a pool at work, each in a thread."""
    answering = [
        Thread(target=run_ffn_worker, args=(checkpoint, config, ffn, pool, attention, store), daemon=True)
        for ffn in range(pool.workers)
    ]
    for worker in answering:
        worker.start()
    return answering


def run_ffn_worker(
    checkpoint: Checkpoint, config: ServeConfig, ffn: int, pool: FFNPool, attention: int, store: dist.Store
) -> None:
    FFNWorker(checkpoint, config, ffn, pool, store).serve(attention)


def wait_for_end(answering: list[Thread]) -> None:
    for worker in answering:
        worker.join(30)
        assert not worker.is_alive(), "an FFN worker goes on though nobody is left to ask it"


def processes_of(role: str) -> list[int]:
    """Of the Ray that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ends right now, or has and nobody has asked how
            if any(f"ray::{role}" in word for word in process.cmdline()):
                found.append(process.pid)
    return found


async def streamed(
    client: Client, wanted: list[Request], meanwhile: Callable[[], Awaitable[None]] | None = None
) -> list[list[int]]:
    """What is said to each; `meanwhile` begins when every request has three tokens."""
    said: list[list[int]] = [[] for _ in wanted]
    reached = asyncio.Event()

    async def ask(place: int, request: Request) -> None:
        async for output in client.generate(request):
            said[place].append(output.token_id)
            if all(len(text) >= 3 for text in said):
                reached.set()

    asking = [asyncio.create_task(ask(place, request)) for place, request in enumerate(wanted)]
    await reached.wait()
    if meanwhile is not None:
        await meanwhile()
    await asyncio.gather(*asking)
    return said
