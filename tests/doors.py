"""The HTTP door before a real engine of a tiny model, joined or split, with a server and all workers in threads."""

from __future__ import annotations

import asyncio
import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import httpx
import uvicorn
from fake_engine import byte_tokenizer
from tiny import tiny_model, write_random_checkpoint

from expertmesh.launch.client import Client, LocalWorker
from expertmesh.launch.door import build_app
from expertmesh.system.model.checkpoint import Checkpoint, open_checkpoint
from expertmesh.system.serve.loop import EngineLoop
from expertmesh.system.tokenizer import Tokenizer

MODEL = "org/tiny"  # as callers name it


def tiny_checkpoint(folder: Path) -> Checkpoint:
    """Random weights, a token for each byte, a context of 64 tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.save(folder / "data" / "tokenizer")
    return open_checkpoint(write_random_checkpoint(folder, tiny_model(vocab_size=tokenizer.vocab_size)))


@contextmanager
def open_door(checkpoint: Checkpoint, loops: Sequence[EngineLoop], api_key: str | None = None) -> Iterator[str]:
    """The address of a server before the engines, which end with it."""
    listener = socket.create_server(("127.0.0.1", 0))
    server: uvicorn.Server | None = None

    async def answer() -> None:
        nonlocal server
        async with Client([LocalWorker(loop) for loop in loops], checkpoint.config.context_length) as client:
            app = build_app(client, Tokenizer.load(checkpoint.folder), MODEL, api_key)
            server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
            await server.serve(sockets=[listener])
        for loop in loops:
            await asyncio.to_thread(loop.close)

    serving = Thread(target=asyncio.run, args=(answer(),), daemon=True)
    serving.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        assert server is not None
        server.should_exit = True
        serving.join(30)
        assert not serving.is_alive(), "the server does not end"


def figures(address: str, headers: dict[str, str] | None = None) -> dict[str, float]:
    """What /metrics tells, label by label added up."""
    told: dict[str, float] = defaultdict(float)
    for line in httpx.get(f"{address}/metrics", headers=headers).text.splitlines():
        if not line.startswith("#"):
            told[line.split("{")[0]] += float(line.split()[-1])
    return told
