"""Whole nodes of a real cluster are killed and stopped, and those who drive work on it: it ends as it does without.

A node is a `ray start --block` on this host and all that came of it. Each has a place for one worker, so that two
workers are on two nodes.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil
import pytest
from commands import TINY_RECIPE, expertmesh_json, start_expertmesh
from serving import requests, streamed
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.launch import local_cluster, ray_cluster
from expertmesh.launch.event_log import read_events
from expertmesh.launch.local_cluster import LocalCluster
from expertmesh.launch.pools import Pools
from expertmesh.launch.ray_cluster import Pool, cluster
from expertmesh.launch.roles import FFNRole
from expertmesh.launch.serving import bring_up, look_at
from expertmesh.launch.status import status_of
from expertmesh.launch.worker_failed import WorkerFailed
from expertmesh.system.serve.config import ServeConfig

COMES_S = 240.0  # for what is waited for, on a busy machine
ENDS_S = 30.0  # for what is seen to be over


def tree(node: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(node), *psutil.Process(node).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def strike(node: int, how: signal.Signals) -> None:
    """Do it to all processes of a node."""
    for process in tree(node):
        process.send_signal(how)


def works(node: int, role: str = "TrainerRole") -> bool:
    for process in tree(node):
        with suppress(psutil.Error):  # it has just ended
            if f"ray::{role}" in " ".join(process.cmdline()):
                return True
    return False


class Nodes:
    """The nodes of a cluster that is up; the head is the first."""

    def __init__(self, there: LocalCluster) -> None:
        self.there = there
        self.left = list(there.nodes)

    def have(self, count: int) -> None:
        """Bring up as many as are missing."""
        if len(self.left) >= count:
            return
        number = len(self.there.nodes)
        self.left += [
            local_cluster.start_node(number + more, 1, self.there.address) for more in range(count - len(self.left))
        ]
        try:
            local_cluster._await_nodes(self.there._replace(nodes=self.left), 1, time.monotonic() + COMES_S)
        finally:  # they are to be ended, too
            self.there.nodes.extend(node for node in self.left if node not in self.there.nodes)

    def lose_one(self, how: signal.Signals) -> None:
        """One that has a trainer and is not the head."""
        node = next(node for node in self.left[1:] if works(node))
        strike(node, how)
        self.left.remove(node)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = COMES_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    short = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))  # unix sockets allow about 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_cluster, "folder", lambda: short / "c")
        patch.setattr(local_cluster, "UP_S", COMES_S)
        there = local_cluster.up(4, cpus=1)
        for key, value in local_cluster.environment(there.token).items():
            patch.setenv(key, value)
        nodes = Nodes(there)
        try:
            yield nodes
        finally:
            family = [process for node in there.nodes for process in tree(node)]
            local_cluster._end(there.nodes)
            assert not psutil.wait_procs(family, ENDS_S)[1]
            shutil.rmtree(short)


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


def assert_same_run(run: dict[str, Any], other: dict[str, Any]) -> None:
    """Losses, and a file of weights, bit for bit."""
    assert run["losses"] == other["losses"] and run["validation_loss"] == other["validation_loss"]
    mine, theirs = (Path(each["checkpoint"]) / "model-00002-of-00002.safetensors" for each in (run, other))
    assert mine.read_bytes() == theirs.read_bytes()


def happened(run_dir: Path, what: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["what"] == what]


def start(nodes: Nodes, folder: Path, name: str, *words: str) -> Popen[str]:
    """A run on the cluster, as soon as it has saved something."""
    run_dir = folder / "runs" / name
    known = len(happened(run_dir, "saved"))
    command = start_expertmesh(*RUN, f"name={name}", *words, "--address", nodes.there.address, folder=folder)
    wait_until(lambda: len(happened(run_dir, "saved")) > known or command.poll() is not None, "nothing was saved")
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
        wait_until(lambda times=times: got_over(run_dir, times), f"{how.name} is not survived")
        assert len(happened(run_dir, "failed")) == times, "a node that is lost is one failure"
    nodes.lose_one(signal.SIGKILL)
    told = last_words(command)
    assert command.returncode == 1
    assert "pool trainer asks for 2 workers of 1 CPU; the cluster has room for 1: " in told
    assert "the same command goes on from the last checkpoint" in told
    nodes.have(2)
    again = expertmesh_json(*RUN, "name=lost", "--address", nodes.there.address, folder=folder)
    assert_same_run(again, whole)


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
