"""A checkpoint brought up to answer requests: in this process, or as two pools of workers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from expertmesh.launch.client import Client, LocalWorker
from expertmesh.launch.find_checkpoint import find_checkpoint
from expertmesh.launch.survival import Restarts, give_up_silent, keep_up, tell_end
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.draft import build_drafter
from expertmesh.system.serve.request import Output, Request
from expertmesh.system.tokenizer import Tokenizer

if TYPE_CHECKING:  # serving joined does without Ray
    from expertmesh.launch.ray_cluster import Pool
    from expertmesh.parallel.timeline import Busy
    from expertmesh.system.serve.engine import EngineCounts


class Pools(NamedTuple):
    """How many workers hold the two halves of the model."""

    attention: int
    ffn: int


class Served(NamedTuple):
    """A checkpoint that was looked at and can be brought up."""

    checkpoint: Checkpoint
    name: str  # the folder's, as the user gave it
    tokenizer: Tokenizer

    @property
    def model(self) -> ModelConfig:
        return self.checkpoint.config


def look_at(path: Path) -> Served:
    """Look at what is to be served: a checkpoint of ours or of Hugging Face's, or a run. ValueError with one line."""
    checkpoint = find_checkpoint(path)
    return Served(checkpoint, path.absolute().name, Tokenizer.load(checkpoint.folder))


def check_pools(model: ModelConfig, config: ServeConfig, attention: int | None, ffn: int | None) -> Pools | None:
    """The pools that were asked for; None: joined. Raises ValueError for what the model cannot be served with."""
    joined = attention is None and ffn is None
    build_drafter(config, model, experts_here=joined)
    if joined:
        return None
    pools = Pools(1 if attention is None else attention, 1 if ffn is None else ffn)
    if min(pools) < 1:
        raise ValueError(f"--attention {pools.attention} --ffn {pools.ffn}: each pool needs at least one worker")
    if pools.ffn > model.moe.ffn_experts:
        raise ValueError(f"--ffn {pools.ffn}: the model has {model.moe.ffn_experts} FFN experts a layer to share out")
    return pools


def check_trace(path: Path | None) -> None:
    """Raises ValueError where no trace can be written, before anything is computed."""
    if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"--trace {path}: no file can be written there")


def listen(host: str, port: int) -> socket.socket:
    """Take the port now, so that a taken one is known before a model is loaded. Raises OSError."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return listener


def serve_forever(
    served: Served,
    pools: Pools | None,
    config: ServeConfig,
    model_name: str,
    listener: socket.socket,
    ready: Callable[[], None],
    address: str | None,
    trace: Path | None = None,
    api_key: str | None = None,
) -> None:
    """Answer HTTP requests on `listener` until the process is interrupted; `ready` is called once it does."""
    import uvicorn

    from expertmesh.launch.door import build_app

    async def answer() -> None:
        async with bring_up(served, pools, config, address, trace) as client:
            app = build_app(client, served.tokenizer, model_name, api_key)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            ready()
            await serving

    asyncio.run(answer())


@asynccontextmanager
async def bring_up(
    served: Served,
    pools: Pools | None,
    config: ServeConfig,
    address: str | None = None,
    trace: Path | None = None,
) -> AsyncIterator[Client]:
    """An engine for `served`, joined (`pools` None) or split; ends with the context. `trace`: written at the end."""
    from expertmesh.parallel.timeline import write_trace

    context_length = config.room(served.model.context_length)
    if pools is None:
        from expertmesh.system.serve.workers import joined_engine

        loop = joined_engine(served.checkpoint, config, trace is not None)
        try:
            async with Client([LocalWorker(loop)], context_length) as client:
                yield client
        finally:
            await asyncio.to_thread(loop.close)
            if trace is not None:
                write_trace(trace, [loop.spans()])
        return

    from expertmesh.launch.ray_cluster import Pool, cluster
    from expertmesh.launch.rendezvous import Rendezvous
    from expertmesh.launch.roles import AttentionRole, FFNRole

    with cluster(address, cpus=sum(pools)) as host:
        store = Rendezvous(host)
        ffn = Pool("ffn", FFNRole, pools.ffn, 1, store.host, store.port)
        attention = Pool("attention", AttentionRole, pools.attention, 1, store.host, store.port)
        answering = ffn.start("run", served.checkpoint, config, pools.ffn, pools.attention)
        linking = attention.start("start", served.checkpoint, config, pools.ffn, trace is not None)
        while not await asyncio.to_thread(attention.finished, linking, 0.2):
            ffn.finished(answering, seconds=0)  # one that cannot load its experts would be waited for in vain
        restarts = Restarts(config.restarts)
        ask_again = ("run", served.checkpoint, config, pools.ffn, pools.attention)
        watching = [asyncio.create_task(keep_up(ffn, answering, ask_again, restarts, store.store))]

        async def revive(rank: int, error: Exception) -> None:
            restarts.spend(str(error))
            attention.replace(rank)
            call = attention.call(rank, "start", served.checkpoint, config, pools.ffn, trace is not None)
            while not attention.wait([call], 0):
                await asyncio.sleep(0.1)
            attention.answer(rank, call, 0)

        workers = [PoolWorker(attention, rank) for rank in range(pools.attention)]
        async with Client(workers, context_length, revive) as client:
            watching.append(asyncio.create_task(give_up_silent(client, workers, config.exchange_timeout_s)))
            for task in watching:
                task.add_done_callback(tell_end)
            try:
                yield client
            finally:
                for task in watching:
                    task.cancel()
                if trace is not None:
                    with suppress(RuntimeError):  # of a worker that died: there is a better message on its way
                        write_trace(trace, [await attention.ask(rank, "spans") for rank in range(pools.attention)])


class PoolWorker:
    """One attention worker of a pool. Requests and whole steps of outputs cross Ray; tensors never do."""

    def __init__(self, pool: Pool, rank: int) -> None:
        self._pool, self._rank = pool, rank

    async def submit(self, request: Request) -> None:
        await self._order("submit", request)

    async def cancel(self, request_id: str) -> None:
        await self._order("cancel", request_id)

    async def busy(self) -> Busy:
        return await self._pool.ask(self._rank, "busy")

    async def counts(self) -> EngineCounts:
        return await self._pool.ask(self._rank, "counts")

    async def loads(self) -> dict[int, list[int]]:
        return await self._pool.ask(self._rank, "loads")

    def outputs(self) -> AsyncIterator[list[Output]]:
        return self._pool.stream(self._rank, "outputs")

    async def _order(self, what: str, argument: object) -> None:
        from expertmesh.launch.ray_cluster import WorkerFailed

        try:
            await self._pool.ask(self._rank, what, argument)
        except WorkerFailed as failure:
            if failure.died:
                raise ConnectionError(str(failure)) from failure
            raise
