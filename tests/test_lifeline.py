"""Real processes hold real lines: which ends are told as a death, and who ends with a line that is cut."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import pytest
import torch.distributed as dist

from expertmesh.launch.lifeline import _KEY, Lifeline, Lifelines
from expertmesh.launch.rendezvous import Rendezvous, join

COMES_S = 60.0


def work(port: int, epoch: int, rank: int, leaves: bool) -> None:
    line = Lifeline("127.0.0.1", join("127.0.0.1", port), epoch, rank)
    if leaves:
        line.close()
    else:
        time.sleep(600)


class Coordinator:
    def __init__(self) -> None:
        self.meeting = Rendezvous("127.0.0.1")
        self.lines = Lifelines("127.0.0.1", self.meeting.store)
        self.workers: list[BaseProcess] = []

    def worker(self, rank: int, epoch: int = 0, leaves: bool = False) -> BaseProcess:
        args = (self.meeting.port, epoch, rank, leaves)
        started = multiprocessing.get_context("spawn").Process(target=work, args=args, daemon=True)
        started.start()
        self.workers.append(started)
        return started

    def wait_until(self, condition: Callable[[], object]) -> list[int]:
        """The ranks that lost their lines until then."""
        broken, deadline = [], time.monotonic() + COMES_S
        while not condition():
            assert time.monotonic() < deadline
            broken += self.lines.wait(0.05)
        return broken

    def at_work(self, ranks: int) -> None:
        """Wait until so many hold lines and have said who they are."""
        assert self.wait_until(lambda: sum(len(heard) == 8 for heard in self.lines._heard.values()) == ranks) == []


@pytest.fixture
def here() -> Iterator[Coordinator]:
    coordinator = Coordinator()
    yield coordinator
    for worker in coordinator.workers:
        worker.kill()
        worker.join()


def test_a_death_ends_the_wait_and_a_stop_does_not(here):
    here.worker(0)
    killed = here.worker(1)
    here.at_work(2)
    os.kill(killed.pid, signal.SIGSTOP)
    assert here.lines.wait(0.2) == [], "a process that is stopped has closed nothing"
    os.kill(killed.pid, signal.SIGKILL)
    assert here.lines.wait(COMES_S) == [1]
    assert here.lines.wait(0.2) == [], "it is told once"


def test_who_leaves_as_it_should_is_not_dead(here):
    here.worker(0)
    here.at_work(1)
    leaver = here.worker(1, leaves=True)
    assert here.wait_until(lambda: not leaver.is_alive()) + here.lines.wait(0.2) == []
    assert leaver.exitcode == 0 and len(here.lines._heard) == 1


@pytest.mark.parametrize("cut", [lambda lines: lines.cut(0), lambda lines: lines.begin(1)], ids=["cut", "next epoch"])
def test_a_worker_that_lives_ends_with_its_line(here, cut):
    worker = here.worker(0)
    here.at_work(1)
    cut(here.lines)
    assert here.wait_until(lambda: not worker.is_alive()) == [], "who cut it knows"
    assert worker.exitcode == 1


def test_a_worker_of_an_epoch_that_is_over_ends_when_it_comes(here):
    here.lines.begin(3)
    late, other = here.worker(0, epoch=2), here.worker(0, epoch=3)
    assert here.wait_until(lambda: not late.is_alive()) == [] and late.exitcode == 1
    here.at_work(1)
    assert other.is_alive()
    other.kill()
    assert here.lines.wait(COMES_S) == [0]


def test_it_is_woken(here):
    here.lines.wake()
    began = time.monotonic()
    assert here.lines.wait(COMES_S) == [] and time.monotonic() - began < COMES_S / 2


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\0" + b"\1\0\0\0" + b"..."])
def test_a_stranger_is_nobodys_death(here, said):
    port = int(here.meeting.store.get(_KEY))
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(said)
    assert here.wait_until(lambda: here.lines._heard) + here.wait_until(lambda: not here.lines._heard) == []


def test_without_a_line_a_worker_works():
    """Under a coordinator that holds none, or behind a firewall."""
    store = dist.HashStore()
    Lifeline("127.0.0.1", store, 0, 0).close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        store.set(_KEY, str(taken.getsockname()[1]))
    Lifeline("127.0.0.1", store, 0, 0).close()
