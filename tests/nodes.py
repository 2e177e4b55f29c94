"""Several real Ray nodes on this host, and what can befall them.

A node is a `ray start --block` and all that came of it. Each has a place for one worker, so that two workers are on two
nodes.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from commands import await_end

from expertmesh.launch import local_cluster
from expertmesh.launch.local_cluster import LocalCluster

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
        with suppress(psutil.NoSuchProcess):  # it has just ended
            process.send_signal(how)


def processes_of(node: int, role: str) -> Iterator[psutil.Process]:
    """Of its workers."""
    for process in tree(node):
        with suppress(psutil.Error):  # it has just ended
            if f"ray::{role}" in " ".join(process.cmdline()):
                yield process


def works(node: int, role: str = "TrainerRole") -> bool:
    return next(processes_of(node, role), None) is not None


def serves(node: int) -> bool:
    return works(node, "AttentionRole") or works(node, "FFNRole")


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


@contextmanager
def real_nodes() -> Iterator[Nodes]:
    """Four of them, and settings with which Ray lets this process in. None of their processes is left at the end."""
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
            await_end(family, ENDS_S)
            shutil.rmtree(short)
