"""Hundreds of requests of all kinds while workers are killed and stopped: each text is what a joined engine says.

Over HTTP with the real client, against the command as a user starts it. Lengths run from one token to the whole
context, some stream, some are drawn with a seed, some callers leave early. Faults come when so many requests are done,
at random numbers: a slow machine sees as many as a fast one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
from commands import await_end, start_expertmesh
from tiny import VOCAB_SIZE, prepare_tiny_data, tiny_model, write_random_checkpoint

REQUESTS, AT_ONCE, SEED = 500, 24, 1
FAULTS = [  # FFN and attention workers in turn
    ("FFNRole", signal.SIGKILL),
    ("AttentionRole", signal.SIGKILL),
    ("FFNRole", signal.SIGSTOP),
    ("AttentionRole", signal.SIGKILL),
    ("FFNRole", signal.SIGKILL),
    ("AttentionRole", signal.SIGSTOP),
]
POOLS = {"AttentionRole": 2, "FFNRole": 2}
WAIT_S = 120


@dataclass(frozen=True)
class Ask:
    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int
    stream: bool
    leaves_after: int | None  # chunks


def draw_asks(context: int) -> list[Ask]:
    draw = random.Random(SEED)
    asks = []
    for number in range(REQUESTS):
        length = draw.choice([1, 2, draw.randint(3, context - 1), context - 1])
        leaves = draw.random() < 0.2
        asks.append(
            Ask(
                [draw.randrange(10, VOCAB_SIZE) for _ in range(length)],
                draw.randint(1, context - length),
                draw.choice([0.0, 0.8]),
                number,
                leaves or draw.random() < 0.5,
                draw.randint(1, 6) if leaves else None,
            )
        )
    return asks


@contextmanager
def service(folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `expertmesh serve` and its address; afterwards nothing of it is left."""
    server = start_expertmesh("serve", "random", "--port", "0", "--json", *words, folder=folder)
    started: set[psutil.Process] = set()
    try:
        ready = json.loads(server.stdout.readline())
        yield server, ready["base_url"]
        started = set(psutil.Process(server.pid).children(recursive=True))
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=WAIT_S)
    assert server.returncode in (0, 130), errors
    await_end(started, 20)


def workers(server: subprocess.Popen[str], role: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            if any(f"ray::{role}" in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def await_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


async def ask_all(base_url: str, asks: list[Ask], done: Callable[[int], None]) -> list[str | None]:
    """The text of each; None where the caller left. `done` is told how many have ended."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=WAIT_S)
    places, texts, ended = asyncio.Semaphore(AT_ONCE), [None] * len(asks), 0

    async def text(ask: Ask) -> str | None:
        settings = {"max_tokens": ask.max_tokens, "temperature": ask.temperature, "seed": ask.seed}
        words = {"model": "random", "prompt": ask.prompt, **settings, "extra_body": {"ignore_eos": True}}
        if not ask.stream:
            return (await client.completions.create(**words)).choices[0].text
        said, chunks = "", 0
        async with await client.completions.create(**words, stream=True) as stream:
            async for chunk in stream:
                said, chunks = said + chunk.choices[0].text, chunks + 1
                if chunks == ask.leaves_after:
                    return None
        return said

    async def one(number: int) -> None:
        nonlocal ended
        async with places:
            texts[number] = await text(asks[number])
        ended += 1
        done(ended)

    async with client:
        await asyncio.gather(*(one(number) for number in range(len(asks))))
    return texts


def test_every_text_survives(tmp_path):
    prepare_tiny_data(tmp_path)
    model = tiny_model()
    write_random_checkpoint(tmp_path, model)
    asks, draw = draw_asks(model.context_length), random.Random(SEED + 1)
    with service(tmp_path) as (_, base_url):
        right = asyncio.run(ask_all(base_url, asks, lambda ended: None))

    settings = ("serve.exchange_timeout_s=3", "serve.restarts=100", "serve.micro_batch_tokens=1")
    with service(tmp_path, "--attention", "2", "--ffn", "2", *settings) as (server, base_url):
        faults = dict(zip(sorted(draw.sample(range(20, REQUESTS - 50), len(FAULTS))), FAULTS, strict=True))
        struck = []

        def strike(ended: int) -> None:
            if ended in faults:
                role, how = faults[ended]
                if candidates := workers(server, role):
                    os.kill(draw.choice(candidates).pid, how)
                    struck.append((role, how))

        said = asyncio.run(ask_all(base_url, asks, strike))
        assert len(struck) >= 4, f"faults came before workers did: {struck}"

        def figures() -> dict[str, float]:
            answer = httpx.get(base_url.removesuffix("/v1") + "/metrics")
            lines = answer.text.splitlines() if answer.is_success else []
            return {line.split("{")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}

        await_until(
            lambda: {role: len(workers(server, role)) for role in POOLS} == POOLS, "the pools are not whole again"
        )
        await_until(lambda: figures().get("vllm:kv_cache_usage_perc") == 0, "pages are lost")
        idle = figures()
        assert idle["vllm:num_requests_running"] == idle["vllm:num_requests_waiting"] == 0
    wrong = [number for number, (a, b) in enumerate(zip(said, right, strict=True)) if a is not None and a != b]
    assert not wrong
    assert sum(text is not None for text in said) > REQUESTS / 2
