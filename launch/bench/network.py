"""Several nodes on one host: each has a network and a host name of its own, and a link to each of the others.

A node is a network namespace of the kernel; a link is a pair of virtual interfaces, held to its rate by a token bucket
(tc tbf), with a delay where the kernel has netem. Processes enter a node and are then on no other network; the kernel
counts what leaves by each link. A node has one address, which all of its interfaces carry.

    node 0 ─ to-1 ═══════ to-0 ─ node 1         10.77.0.(node + 1)
        └─── to-2 ═══════ to-0 ─ node 2 ...

It takes root and iproute2. The namespaces of a process that was killed are taken down by whoever comes next.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

_PREFIX = "expertmesh-"  # then the process that made it, something of its own, and the node
_NAMESPACES = Path("/run/netns")  # where `ip netns` keeps them
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000  # linux/sched.h
_BUCKET_S, _QUEUE_MS = 0.01, 100  # what a link may send at once, in seconds of its rate; how long it keeps the rest

Pair = tuple[int, int]  # two nodes, the smaller first


class NoNetwork(RuntimeError):
    """Nodes cannot be emulated here; one line that says what is missing."""


class Network(NamedTuple):
    """Nodes that are up."""

    namespaces: tuple[str, ...]  # of each node
    emulated: str  # what its links are held to, in words

    def enter(self, node: int) -> str:
        """Be on `node` from now on, this thread and those that it starts; returns an interface there."""
        with open(_NAMESPACES / self.namespaces[node]) as namespace:
            _system_call("setns", namespace.fileno(), _CLONE_NEWNET)
        _system_call("unshare", _CLONE_NEWUTS)
        socket.sethostname(f"node-{node}")
        return f"to-{1 if node == 0 else 0}"

    def sent(self) -> dict[Pair, int]:
        """Bytes that have left by each link, both ways, with the headers of all packets."""
        counted = dict.fromkeys(combinations(range(len(self.namespaces)), 2), 0)
        for node, name in enumerate(self.namespaces):
            for interface in json.loads(_run("ip", "-json", "-statistics", "-netns", name, "link", "show")):
                if (to := interface["ifname"]).startswith("to-"):
                    other = int(to.removeprefix("to-"))
                    counted[min(node, other), max(node, other)] += interface["stats64"]["tx"]["bytes"]
        return counted


@contextmanager
def network(nodes: int, mbit: float, slow: dict[Pair, float], delay_ms: float = 0.0) -> Iterator[Network]:
    """`nodes` with links of `mbit` megabits a second each way, but those of `slow`.

    `delay_ms`: of each packet, where the kernel can. Raises NoNetwork.
    """
    if os.geteuid() != 0:
        raise NoNetwork("an emulated network takes root, which may make network namespaces")
    if missing := [program for program in ("ip", "tc") if shutil.which(program) is None]:
        raise NoNetwork(f"an emulated network takes {' and '.join(missing)} of iproute2, not installed here")
    _sweep()
    prefix = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(2)}"
    names = tuple(f"{prefix}-{node}" for node in range(nodes))
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-netns", name, "link", "set", "lo", "up")
        delayed = True
        for a, b in combinations(range(nodes), 2):
            ends = (a, b), (b, a)
            first, second = (["name", f"to-{other}", "netns", names[node]] for node, other in ends)
            _run("ip", "link", "add", *first, "type", "veth", "peer", *second)
            for node, other in ends:
                own = ["ip", "-netns", names[node]]
                _run(*own, "address", "add", _address(node), "peer", _address(other), "dev", f"to-{other}")
                _run(*own, "link", "set", f"to-{other}", "up")
                delayed &= _hold(names[node], f"to-{other}", slow.get((a, b), mbit), delay_ms)
        yield Network(names, _in_words(mbit, slow, delay_ms, delayed))
    finally:
        for name in names:
            if (_NAMESPACES / name).exists():
                _run("ip", "netns", "delete", name)


def _hold(namespace: str, interface: str, mbit: float, delay_ms: float) -> bool:
    """Hold what leaves by an interface to a rate; returns whether the kernel also delays it as asked."""
    bucket = str(max(int(mbit * 1e6 / 8 * _BUCKET_S), 1 << 16))
    rate = ["tbf", "rate", f"{mbit:g}mbit", "burst", bucket, "latency", f"{_QUEUE_MS}ms"]
    add = ["tc", "-netns", namespace, "qdisc", "add", "dev", interface]
    _run(*add, "root", "handle", "1:", *rate)
    if not delay_ms:
        return True
    try:
        _run(*add, "parent", "1:1", "handle", "2:", "netem", "delay", f"{delay_ms:g}ms")
    except NoNetwork:
        return False
    return True


def _in_words(mbit: float, slow: dict[Pair, float], delay_ms: float, delayed: bool) -> str:
    links = [f"{rate:g} Mbit/s between nodes {a} and {b}" for (a, b), rate in slow.items()]
    delay = f"{delay_ms:g} ms each way" if delay_ms and delayed else "no delay"
    why = "" if delayed else " (this kernel has no netem)"
    return f"{', '.join([*links, f'{mbit:g} Mbit/s elsewhere'])}; {delay}{why}"


def _address(node: int) -> str:
    return f"10.77.0.{node + 1}"


def _sweep() -> None:
    """Take down what killed processes have left."""
    for path in _NAMESPACES.glob(f"{_PREFIX}*"):
        owner = path.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with suppress(NoNetwork):  # somebody else does so, too
                _run("ip", "netns", "delete", path.name)


def _run(*words: str) -> str:
    """What a command prints. Raises NoNetwork, with the line that it says of its failure."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise NoNetwork(f"no network can be emulated here: `{' '.join(words)}`: {' '.join(done.stderr.split())}")
    return done.stdout


def _system_call(name: str, *arguments: int) -> None:
    """One that Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        error = ctypes.get_errno()
        raise NoNetwork(f"no network can be emulated here: {name}: {os.strerror(error)}")
