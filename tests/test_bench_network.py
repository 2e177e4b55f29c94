"""Emulated nodes: processes on them meet over links whose bytes the kernel counts, and nothing is left of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from expertmesh.launch.bench import network as emulation
from expertmesh.launch.bench.network import Network, NoNetwork, network

PAYLOAD = 1_000_000


def left() -> list[str]:
    """The namespaces that this process has made, and still has."""
    return [path.name for path in Path("/run/netns").glob(f"expertmesh-{os.getpid()}-*")]


@pytest.fixture
def emulated() -> None:
    try:
        with network(2, 1000, {}):
            pass
    except NoNetwork as error:
        pytest.skip(str(error))


def listen(nodes: Network, node: int, told: Any) -> None:
    nodes.enter(node)
    with socket.create_server((f"10.77.0.{node + 1}", 7000)) as server:
        told.send(socket.gethostname())
        connection, _ = server.accept()
        with connection:
            while connection.recv(1 << 16):
                pass
    told.send("done")


def speak(nodes: Network, node: int, to: int) -> None:
    nodes.enter(node)
    with socket.create_connection((f"10.77.0.{to + 1}", 7000)) as connection:
        connection.sendall(bytes(PAYLOAD))


def test_bytes_are_counted_on_the_link_that_they_take(emulated):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with network(3, 1000, {(1, 2): 200}, delay_ms=1) as nodes:
        assert nodes.emulated.startswith("200 Mbit/s between nodes 1 and 2, 1000 Mbit/s elsewhere; ")
        before = nodes.sent()
        server = context.Process(target=listen, args=(nodes, 2, there), daemon=True)
        server.start()
        assert here.poll(60) and here.recv() == "node-2"
        client = context.Process(target=speak, args=(nodes, 1, 2), daemon=True)
        client.start()
        client.join(60)
        assert client.exitcode == 0 and here.poll(60) and here.recv() == "done"
        sent = {pair: count - before[pair] for pair, count in nodes.sent().items()}
        server.join(60)
        held = [
            subprocess.run(["tc", "-netns", name, "qdisc"], capture_output=True, text=True).stdout for name in nodes[0]
        ]
    assert PAYLOAD < sent.pop((1, 2)) < 1.2 * PAYLOAD
    assert max(sent.values()) < PAYLOAD / 100
    assert [text.count("rate 200Mbit") for text in held] == [0, 1, 1] and "rate 1Gbit" in held[0]
    assert socket.gethostname() != "node-2" and left() == []


def test_nothing_is_left_after_an_error(emulated):
    with pytest.raises(ZeroDivisionError), network(2, 1000, {}):
        assert len(left()) == 2
        raise ZeroDivisionError
    assert left() == []


def be_up(told: Any) -> None:
    with network(2, 1000, {}) as nodes:
        told.send(nodes.namespaces)
        time.sleep(600)


def test_what_a_killed_process_has_left_goes_with_the_next(emulated):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    killed = context.Process(target=be_up, args=(there,), daemon=True)
    killed.start()
    assert here.poll(60)
    names = here.recv()
    with network(2, 1000, {}):
        assert all(Path("/run/netns", name).exists() for name in names), "its maker lives"
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(60)
    with network(2, 1000, {}):
        assert not any(Path("/run/netns", name).exists() for name in names)


@pytest.mark.parametrize(
    "user, missing, told",
    [
        (1000, (), "an emulated network takes root, which may make network namespaces"),
        (0, ("ip", "tc"), "an emulated network takes ip and tc of iproute2, not installed here"),
        (0, ("tc",), "an emulated network takes tc of iproute2, not installed here"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, user, missing, told):
    monkeypatch.setattr(emulation.os, "geteuid", lambda: user)
    monkeypatch.setattr(emulation.shutil, "which", lambda program: None if program in missing else program)
    with pytest.raises(NoNetwork, match=f"^{told}$"), network(2, 1000, {}):
        pass


class Commands:
    """Stands for `ip` and `tc`: keeps what they were told, and fails where one begins with `fails`."""

    def __init__(self, fails: str = "never") -> None:
        self.told: list[str] = []
        self._fails = fails

    def __call__(self, words: tuple[str, ...], **_: Any) -> subprocess.CompletedProcess[str]:
        self.told.append(" ".join(words))
        fails = self._fails in self.told[-1]
        return subprocess.CompletedProcess(words, int(fails), "", "Operation not\npermitted")


@pytest.fixture
def as_if(monkeypatch, tmp_path) -> pytest.MonkeyPatch:
    """With all rights and programs, and no namespaces."""
    monkeypatch.setattr(emulation.os, "geteuid", lambda: 0)
    monkeypatch.setattr(emulation.shutil, "which", lambda program: program)
    monkeypatch.setattr(emulation, "_NAMESPACES", tmp_path)
    return monkeypatch


@pytest.mark.parametrize("netem, delay", [(True, "2 ms each way"), (False, "no delay (this kernel has no netem)")])
def test_each_pair_has_a_link_held_at_both_ends(as_if, netem, delay):
    commands = Commands("never" if netem else "netem")
    as_if.setattr(emulation.subprocess, "run", commands)
    with network(3, 1000, {(0, 2): 50}, delay_ms=2) as nodes:
        assert nodes.emulated == f"50 Mbit/s between nodes 0 and 2, 1000 Mbit/s elsewhere; {delay}"
    assert sum("type veth" in line for line in commands.told) == 3
    assert sum("rate 1000mbit" in line for line in commands.told) == 4
    slow = [line.split()[2].rsplit("-", 1)[1] + line.split()[6] for line in commands.told if "rate 50mbit" in line]
    assert slow == ["0to-2", "2to-0"]


def test_a_host_that_forbids_it_says_so(as_if):
    as_if.setattr(emulation.subprocess, "run", Commands("netns add"))
    with pytest.raises(NoNetwork, match="no network can be emulated here: `ip netns add .*`: Operation not permitted$"):
        with network(2, 1000, {}):
            pass


def test_only_what_nobody_owns_is_taken_down(as_if, tmp_path):
    commands = Commands()
    as_if.setattr(emulation.subprocess, "run", commands)
    for name in (f"expertmesh-{2**22 + 1}-ab-0", f"expertmesh-{os.getpid()}-ab-0", "expertmesh-mine", "other"):
        (tmp_path / name).touch()
    emulation._sweep()
    assert commands.told == [f"ip netns delete expertmesh-{2**22 + 1}-ab-0"]
