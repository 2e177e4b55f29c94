"""A service is given other sizes over HTTP: what is asked, what is refused, and what the command says of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import cast

import pytest
import uvicorn
from fake_engine import FakeEngine, byte_tokenizer
from tiny import tiny_model
from typer.testing import CliRunner

from expertmesh.launch.cli import app as command
from expertmesh.launch.door import build_app
from expertmesh.launch.operate import add_scaling
from expertmesh.launch.pools import Pools
from expertmesh.launch.split_service import Scaled, SplitService
from expertmesh.system.serve.config import ServeConfig


class Split:
    """A service in name only, of one attention and two FFN workers."""

    def __init__(self, problem: str = "") -> None:
        self.pools, self.problem = Pools(1, 2), problem

    async def scale(self, wanted: Pools) -> Scaled:
        if self.problem:
            raise RuntimeError(self.problem)
        self.pools = wanted
        return Scaled(*wanted, 0.25)


@contextmanager
def answering(split: Split | None, api_key: str | None = None) -> Iterator[str]:
    """Where it is reached."""
    app = build_app(FakeEngine(lambda request: []), byte_tokenizer(), "tiny", api_key)
    add_scaling(app, tiny_model(), ServeConfig(), cast(SplitService | None, split))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def scale(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(command, ["scale", *words])
    return done.exit_code, done.output.strip()


def test_the_sizes_that_are_not_given_stay():
    with answering(Split()) as url:
        code, told = scale(url, "--ffn", "3", "--json")
        assert code == 0 and json.loads(told) == {"attention": 1, "ffn": 3, "longest_pause_s": 0.25}
        code, told = scale(f"{url}/v1", "--attention", "2")
        assert (code, told) == (0, "attention 2, ffn 3; no request waited longer than 0.25 s for a token")


def test_whoever_has_the_key():
    with answering(Split(), api_key="secret") as url:
        code, told = scale(url, "--ffn", "3")
        assert code == 2 and "this server needs its API key" in told
        assert scale(url, "--ffn", "3", "--api-key", "secret")[0] == 0


@pytest.mark.parametrize(
    "split, words, code, told",
    [
        (Split(), ["--ffn", "99"], 2, "--ffn 99: the model has 4 FFN experts a layer to share out"),
        (None, ["--ffn", "2"], 2, "it serves joined, in one process: start it with --attention and --ffn to scale it"),
        (Split("no place"), ["--ffn", "1"], 1, "no place; it goes on with what it has"),
        (Split(), [], 2, "a service takes --attention, --ffn or both"),
        (Split(), ["--ffn", "1", "--experts-parallel", "2"], 2, "a service takes --attention, --ffn or both"),
    ],
)
def test_what_is_refused(split, words, code, told):
    with answering(split) as url:
        got, line = scale(url, *words)
    assert (got, line.count("\n")) == (code, 0) and line.startswith("expertmesh: ") and line.endswith(told)


def test_nobody_is_there():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    code, told = scale(url, "--ffn", "2")
    assert code == 2 and told.startswith(f"expertmesh: {url}: no service of ours answers there: ")


@pytest.mark.parametrize("words", [["quickstart"], ["quickstart", "--experts-parallel", "2", "--ffn", "1"]])
def test_a_run_takes_its_own_option(words):
    assert scale(*words) == (
        2,
        "expertmesh: scale quickstart: a training run takes --experts-parallel, and nothing else",
    )
