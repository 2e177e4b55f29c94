"""Several real Ray nodes on this host: what a cluster does to a job can be tried before there is one.

    FOLDER/state.json    {"nodes": [pid, ...], "address": ..., "dashboard": ...}
    FOLDER/token         who has it may use the cluster; Ray listens on all networks
    FOLDER/ray           Ray's own files

FOLDER is in the system's temporary folder, one a user, or what EXPERTMESH_CLUSTER names. Each node is a `ray start
--block` of its own, which ends its own processes when it is told to; `ray stop` would end every Ray of the host.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = "EXPERTMESH_CLUSTER"
UP_S = 120.0  # for all nodes to come; 12 to 24 s seen for three
DOWN_S = 30.0
# A node that is killed is noticed after about 10 s, one that hangs after 20; Ray's own settings take 63 s for that.
# Closer ones would take a busy laptop's node for lost.
HEALTH = {
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


class LocalCluster(NamedTuple):
    """A cluster that is up."""

    address: str  # for `train --address`
    dashboard: str  # for `submit --address`
    token: Path
    nodes: list[int]  # process ids, the head's first


def folder() -> Path:
    # Short: unix sockets allow about 107 bytes.
    return Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir()) / f"expertmesh-cluster-{os.getuid()}")


def find() -> LocalCluster | None:
    """The cluster that is up; None: there is none."""
    try:
        state = json.loads((folder() / "state.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    if not any(_is_ray(pid) for pid in state["nodes"]):
        return None
    return LocalCluster(state["address"], state["dashboard"], folder() / "token", state["nodes"])


def up(nodes: int, cpus: int) -> LocalCluster:
    """Start a head and `nodes` - 1 more, each with `cpus` places for workers.

    Raises ValueError when one is up, RuntimeError when they do not come within UP_S.
    """
    if (there := find()) is not None:
        raise ValueError(f"a cluster is up already, at {there.address}; `expertmesh cluster down` ends it")
    here = folder()
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(mode=0o700)
    token = here / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    started: list[int] = []
    try:
        dashboard, agent, client = _free_ports(3)
        started.append(
            _start(
                cpus,
                {"dashboard-port": dashboard, "dashboard-agent-listen-port": agent, "ray-client-server-port": client},
                {"port": 0, "temp-dir": here / "ray"},
                head=True,
            )
        )
        deadline = time.monotonic() + UP_S
        address = _address(started[0], here / "ray" / "ray_current_cluster", deadline)
        started += [start_node(number, cpus, address) for number in range(1, nodes)]
        found = LocalCluster(address, f"http://127.0.0.1:{dashboard}", token, started)
        _write_state(found)
        _await_nodes(found, cpus, deadline)
        return found
    except BaseException:
        _end(started)
        shutil.rmtree(here, ignore_errors=True)
        raise


def down() -> bool:
    """End the cluster; False when none was up. Its files go, too."""
    there = find()
    if there is not None:
        _end(there.nodes)
    shutil.rmtree(folder(), ignore_errors=True)
    return there is not None


def environment(token: Path) -> dict[str, str]:
    """What a process needs to be let in."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def start_node(number: int, cpus: int, address: str) -> int:
    """Start one more node, labelled `node=NUMBER`, of the cluster at `address`; returns its process id at once."""
    return _start(cpus, {"dashboard-agent-listen-port": 0}, {"labels": f"node={number}", "address": address})


def _start(cpus: int, ports: dict[str, Any], more: dict[str, Any], head: bool = False) -> int:
    options = {"node-ip-address": "127.0.0.1", "num-cpus": cpus, "object-store-memory": 128 * 2**20, **ports, **more}
    number = "head" if head else more["labels"].replace("=", "-")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *(["--head"] if head else [])]
    with open(folder() / f"{number}.log", "wb") as log:
        node = subprocess.Popen(
            command + [f"--{key}={value}" for key, value in options.items()],
            env=os.environ | HEALTH | {"RAY_USAGE_STATS_ENABLED": "0"} | environment(folder() / "token"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives this command, and Ctrl-C in its terminal
        )
    return node.pid


def _free_ports(count: int) -> list[int]:
    """Ports that the kernel calls free, above the range of Ray's workers. Ray must be told, so a race is left."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]


def _address(head: int, path: Path, deadline: float) -> str:
    """The head writes it once it has a port."""
    while not (path.exists() and path.read_text().strip()):
        if not _is_ray(head) or time.monotonic() > deadline:
            raise RuntimeError(f"the head did not start: {_last_line(folder() / 'head.log')}")
        time.sleep(0.1)
    return path.read_text().strip()


def _await_nodes(found: LocalCluster, cpus: int, deadline: float) -> None:
    """Ask the head until it has them all; in a process of its own, since a driver can be on one cluster only.

    Ray gives a node 30 s to come, which a busy machine may need longer; one that ended for that is started again.
    """
    nodes = len(found.nodes)
    program = (
        "import ray, sys, time\n"
        f"ray.init(address={found.address!r}, log_to_driver=False, logging_level='CRITICAL')\n"
        f"while sum(node['Alive'] for node in ray.nodes()) < {nodes}: time.sleep(0.2)\n"
    )
    asking = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | environment(found.token),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while asking.poll() is None and time.monotonic() < deadline:
            for number in range(1, nodes):
                if not _is_ray(found.nodes[number]):
                    found.nodes[number] = start_node(number, cpus, found.address)
                    _write_state(found)
            time.sleep(0.2)
    finally:
        asking.kill()
    if asking.wait() != 0:
        logs = "; ".join(f"{log.stem}: {_last_line(log)}" for log in sorted(folder().glob("*.log")))
        raise RuntimeError(f"{nodes} nodes did not come within {UP_S:g} s: {logs}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "nothing was logged"


def _write_state(found: LocalCluster) -> None:
    content = {"nodes": found.nodes, "address": found.address, "dashboard": found.dashboard}
    writing = folder() / "state.json.writing"
    writing.write_text(json.dumps(content) + "\n")
    os.replace(writing, folder() / "state.json")


def _is_ray(pid: int) -> bool:
    """Whether a process of that number lives, and is one of ours: numbers are used again."""
    try:
        command = Path("/proc", str(pid), "cmdline").read_bytes()
        state = Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    starting = command == b""  # in the moment of its start it has no command line yet
    return (starting or b"ray.scripts.scripts" in command) and state != "Z"


def _end(nodes: list[int]) -> None:
    """Tell the nodes to end, the head last, and stopped ones too; what is left of them then is killed."""
    ours = [pid for pid in reversed(nodes) if _is_ray(pid)]
    for pid in ours:
        os.kill(pid, signal.SIGTERM)
        _send(pid, signal.SIGCONT)
    deadline = time.monotonic() + DOWN_S
    while any(_is_ray(pid) for pid in ours) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in ours:
        _send(pid, signal.SIGKILL)  # Ray's agents may outlive their node by half a minute


def _send(node: int, number: signal.Signals) -> None:
    """To all processes of a node. Its workers are in groups of their own, but in its session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            session = int(stat.read_text().rsplit(")", 1)[1].split()[3])
            if session == node:
                os.kill(int(stat.parent.name), number)
