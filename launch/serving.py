"""A checkpoint brought up to answer requests: in this process, or as two pools of workers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from expertmesh.launch.client import Client, LocalWorker
from expertmesh.launch.find_checkpoint import find_checkpoint
from expertmesh.launch.pools import Pools
from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.tokenizer import Tokenizer

if TYPE_CHECKING:  # serving joined does without Ray
    from expertmesh.launch.split_service import SplitService

MORE_PLACES = 64  # of a cluster of our own: for workers that a service may be given while it answers


class Service(NamedTuple):
    """A checkpoint that is up."""

    client: Client
    split: SplitService | None  # None: joined


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
    from expertmesh.launch.operate import add_scaling

    async def answer() -> None:
        async with bring_up(served, pools, config, address, trace) as service:
            app = build_app(service.client, served.tokenizer, model_name, api_key)
            add_scaling(app, served.model, config, service.split)
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
) -> AsyncIterator[Service]:
    """An engine for `served`, joined (`pools` None) or split; ends with the context. `trace`: written at the end."""
    context_length = config.room(served.model.context_length)
    if pools is None:
        from expertmesh.parallel.timeline import write_trace
        from expertmesh.system.serve.workers import joined_engine

        loop = joined_engine(served.checkpoint, config, trace is not None)
        try:
            async with Client([LocalWorker(loop)], context_length) as client:
                yield Service(client, None)
        finally:
            await asyncio.to_thread(loop.close)
            if trace is not None:
                write_trace(trace, [loop.spans()])
        return

    from expertmesh.launch.ray_cluster import cluster
    from expertmesh.launch.split_service import SplitService

    with (
        cluster(address, cpus=sum(pools) + MORE_PLACES) as host,
        closing(SplitService(host, served.checkpoint, config, trace is not None)) as split,
    ):
        await split.start(pools, context_length)
        try:
            async with split.client as client:
                yield Service(client, split)
        finally:
            split.close()  # nobody is given up while it tells its spans
            if trace is not None:
                with suppress(RuntimeError):  # of a worker that died: there is a better message on its way
                    await split.write_trace(trace)
