"""Whole nodes of a real cluster are killed and stopped, and those who drive work on it: it ends as it does without."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import openai
import psutil
import pytest
from commands import TINY_RECIPE, assert_same_run, expertmesh_json, start_expertmesh, wait_until
from nodes import COMES_S, ENDS_S, Nodes, real_nodes, serves, strike, works
from serving import requests, streamed
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.launch import ray_cluster
from expertmesh.launch.event_log import read_events
from expertmesh.launch.pools import Pools
from expertmesh.launch.ray_cluster import Pool, cluster
from expertmesh.launch.roles import FFNRole
from expertmesh.launch.serving import bring_up, look_at
from expertmesh.launch.status import status_of
from expertmesh.launch.worker_failed import WorkerFailed
from expertmesh.system.serve.config import ServeConfig


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with real_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    return folder


RUN = ("train", "tiny.yaml", "train.steps=60")


@pytest.fixture(scope="module")
def whole(nodes: Nodes, folder: Path) -> dict[str, Any]:
    """A run of which nothing was lost."""
    return expertmesh_json(*RUN, "name=whole", "--address", nodes.there.address, folder=folder)


def happened(run_dir: Path, what: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["what"] == what]


def start(nodes: Nodes, folder: Path, name: str, *words: str) -> Popen[str]:
    """A run on the cluster, as soon as it has saved something."""
    run_dir = folder / "runs" / name
    known = len(happened(run_dir, "saved"))
    command = start_expertmesh(*RUN, f"name={name}", *words, "--address", nodes.there.address, folder=folder)
    wait_until(
        lambda: len(happened(run_dir, "saved")) > known or command.poll() is not None, "nothing was saved", COMES_S
    )
    assert command.poll() is None, command.communicate()
    return command


def got_over(run_dir: Path, times: int) -> bool:
    """Also past the step of the last failure: one that comes again at the same step is not survived twice."""
    failed, saved = happened(run_dir, "failed"), happened(run_dir, "saved")
    return len(happened(run_dir, "training again")) == times and saved[-1]["step"] > failed[-1]["step"]


def last_words(command: Popen[str]) -> str:
    _, errors = command.communicate(timeout=COMES_S)
    return errors.strip().splitlines()[-1]


def test_a_job_outlives_nodes_as_long_as_there_is_room(nodes, folder, whole):
    nodes.have(4)
    run_dir = folder / "runs" / "lost"
    command = start(nodes, folder, "lost")
    for times, how in enumerate((signal.SIGKILL, signal.SIGSTOP), 1):
        nodes.lose_one(how)
        wait_until(lambda times=times: got_over(run_dir, times), f"{how.name} is not survived", COMES_S)
        assert len(happened(run_dir, "failed")) == times, "a node that is lost is one failure"
    nodes.lose_one(signal.SIGKILL)
    told = last_words(command)
    assert command.returncode == 1
    assert "pool trainer asks for 2 workers of 1 CPU; the cluster has room for 1: " in told
    assert "the same command goes on from the last checkpoint" in told
    nodes.have(2)
    again = expertmesh_json(*RUN, "name=lost", "--address", nodes.there.address, folder=folder)
    assert_same_run(again, whole)


def test_a_job_restarts_on_the_nodes_that_are_left(nodes, folder, whole):
    nodes.have(3)
    command = start(nodes, folder, "restarted", "fault.policy=restart", "--json")
    nodes.lose_one(signal.SIGKILL)
    result, errors = command.communicate(timeout=COMES_S)
    assert command.returncode == 0, errors
    assert [event["kept"] for event in happened(folder / "runs" / "restarted", "re-formed")] == [[]]
    assert_same_run(json.loads(result), whole)


def test_a_job_shrinks_to_the_nodes_that_are_left(nodes, folder):
    nodes.have(2)
    command = start(nodes, folder, "shrunk", "fault.policy=shrink", "--json")
    nodes.lose_one(signal.SIGKILL)
    result, errors = command.communicate(timeout=COMES_S)
    assert command.returncode == 0, errors
    assert [event["parallel"]["dp"] for event in happened(folder / "runs" / "shrunk", "re-formed")] == [1]
    assert len(json.loads(result)["losses"]) == 60


async def outlive(checkpoint: Path, address: str, nodes: list[int]) -> int:
    """Returns the node that was killed."""
    async with bring_up(look_at(checkpoint), Pools(1, 2), ServeConfig(exchange_timeout_s=2.0), address) as service:
        client = service.client
        whole = await streamed(client, requests())
        lost = next(node for node in nodes[1:] if works(node, "FFNRole"))

        async def meanwhile() -> None:
            strike(lost, signal.SIGKILL)

        assert await streamed(client, requests(), meanwhile) == whole
        assert not any(one.pages_used for one in await client.counts()), "a page was lost"
        assert sum(works(node, "FFNRole") for node in nodes) == 2
        assert service.split is not None
        assert service.split._restarts._left == ServeConfig().restarts - 1, "one worker was lost, and placed once"
    return lost


def serve_and_strike(checkpoint: Path, address: str, nodes: list[int]) -> int:
    return asyncio.run(asyncio.wait_for(outlive(checkpoint, address, nodes), 2 * COMES_S))


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own: Ray keeps what another test's cluster made of its settings, such as a token."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def test_texts_outlive_a_node(nodes, tmp_path):
    nodes.have(4)
    prepare_tiny_data(tmp_path)
    checkpoint = write_random_checkpoint(tmp_path, tiny_model())
    nodes.left.remove(elsewhere(serve_and_strike, checkpoint, nodes.there.address, nodes.left))


def test_a_door_that_is_killed_leaves_nobody_behind(nodes, tmp_path):
    """Whoever listens is told by the end of the connection, and the same command brings the service up again."""
    nodes.have(4)
    prepare_tiny_data(tmp_path)
    checkpoint = write_random_checkpoint(tmp_path, tiny_model(context_length=4096))
    pools = ("--attention", "1", "--ffn", "2", "--port", "0", "--json", "--address", nodes.there.address)
    for _ in range(2):
        door = start_expertmesh("serve", str(checkpoint), *pools, folder=tmp_path)
        assert door.stdout is not None
        up = json.loads(door.stdout.readline())
        client = openai.OpenAI(base_url=up["base_url"], api_key="none", max_retries=0, timeout=COMES_S)
        asked = {"max_tokens": 4000, "extra_body": {"ignore_eos": True}}
        with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError, httpx.ReadError)):
            for _ in client.completions.create(model=up["model"], prompt="a", stream=True, **asked):
                door.kill()
        door.communicate()
        wait_until(lambda: not any(map(serves, nodes.left)), "workers outlive the door", ENDS_S)


def place_pools(address: str, nodes: list[int], labelled: int, label: dict[str, str]) -> None:
    def holding(where: dict[str, str], strategy: str) -> list[int]:
        pool = Pool("ffn", FFNRole, 2, 0.5, "", 0, where=where, strategy=strategy)
        pool.await_started(range(2))
        found = [node for node in nodes if works(node, "FFNRole")]
        pool.stop()
        wait_until(lambda: not any(works(node, "FFNRole") for node in nodes), "they do not end", ENDS_S)
        return found

    with cluster(address, 1):
        assert holding(label, "PACK") == [labelled]
        assert len(holding({}, "STRICT_SPREAD")) == 2
        told = r"2 workers of 0.5 CPU on nodes with node=\d, each on .* has room for 1: .*\(node=\d\) has 1 CPU, 0 GPU"
        with pytest.raises(WorkerFailed, match=told):
            holding(label, "STRICT_SPREAD")
        others = Pool("others", FFNRole, len(nodes) - 1, 1, "", 0)
        ray_cluster.PLACEMENT_TIMEOUT_S = 2
        with pytest.raises(WorkerFailed, match=r"did not come free within 2 s: .* has 0 of 1 CPU free"):
            holding({}, "STRICT_SPREAD")
        others.stop()


def test_workers_go_where_they_are_asked_to(nodes):
    nodes.have(3)
    labelled = nodes.left[-1]
    options = (word.partition("=") for word in psutil.Process(labelled).cmdline())
    label = next({"node": value.removeprefix("node=")} for key, _, value in options if key == "--labels")
    elsewhere(place_pools, nodes.there.address, nodes.left, labelled, label)


def test_a_run_outlives_its_driver_and_the_head(nodes, folder, whole):
    """Last: no cluster is left."""
    nodes.have(2)
    command = start(nodes, folder, "driven")
    command.kill()
    command.communicate()
    wait_until(lambda: not any(map(works, nodes.left)), "workers outlive the driver", ENDS_S)
    command = start(nodes, folder, "driven", "cluster.head_s=5")
    head, *others = nodes.left
    strike(head, signal.SIGKILL)
    begun = time.monotonic()
    told = last_words(command)
    assert time.monotonic() - begun < ENDS_S and command.returncode == 1
    assert told.startswith("expertmesh: the head of the Ray cluster, ") and "has not answered for 5 s; the same" in told
    # Those at work end at once; one that has just lost its peer ends with its node, which waits a minute for the head.
    wait_until(lambda: not any(map(works, others)), "workers outlive the driver, without a head too", 60 + ENDS_S)
    assert status_of(folder / "runs" / "driven")["state"] == "failed"
    assert_same_run(expertmesh_json(*RUN, "name=driven", folder=folder), whole)
