"""A long drill: runs on several nodes that something befalls again and again, drawn from a seed; nothing is lost.

    pytest -m slow tests/test_drill.py -s          30 minutes; DRILL_MINUTES and DRILL_SEED say otherwise

Workers and nodes are killed and stopped, and the command that drives the run is killed or told to end. Whoever watches
does what the messages say: the same command again, and other nodes in place of those that are lost.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from commands import TINY_RECIPE, assert_same_run, expertmesh_json, start_expertmesh
from nodes import COMES_S, Nodes, processes_of, real_nodes, strike, works

MINUTES, SEED = float(os.environ.get("DRILL_MINUTES", "30")), int(os.environ.get("DRILL_SEED", "1"))
NODES, FAULTS_PER_RUN = 4, 5
FAULTS = ("kill a worker", "stop a worker", "kill a node", "stop a node", "kill the driver", "tell the driver to end")
RUN = ("train", "tiny.yaml", "train.steps=200", "fault.budget=1000", "fault.stall_s=15", "--json")


def befall(nodes: Nodes, driver: int, what: str) -> bool:
    """False where there is nobody that it could befall: between two epochs."""
    how = signal.SIGKILL if what.startswith("kill") else signal.SIGSTOP
    if "driver" in what:
        os.kill(driver, signal.SIGTERM if what.startswith("tell") else signal.SIGKILL)
        return True
    at_work = [node for node in nodes.left[1:] if works(node)]
    if not at_work:
        return False
    if "node" in what:
        strike(at_work[0], how)
        nodes.left.remove(at_work[0])
        return True
    for process in processes_of(at_work[0], "TrainerRole"):
        process.send_signal(how)
    return True


def drilled(nodes: Nodes, folder: Path, name: str, draw: Random) -> tuple[dict[str, Any], Counter[str]]:
    """A run to its end, and what befell it."""
    befell: Counter[str] = Counter()
    while True:
        nodes.have(NODES)
        with start_expertmesh(*RUN, f"name={name}", "--address", nodes.there.address, folder=folder) as command:
            deadline = time.monotonic() + COMES_S
            while command.poll() is None and befell.total() < FAULTS_PER_RUN:
                time.sleep(draw.uniform(2, 15))
                what = draw.choice(FAULTS)
                if command.poll() is None and befall(nodes, command.pid, what):
                    befell[what] += 1
                    print(f"{name}: {what}", flush=True)
                    if "node" in what:
                        break  # the rest of this command has a node less
                assert time.monotonic() < deadline, "nobody is at work"
            result, errors = command.communicate(timeout=2 * COMES_S)
        if command.returncode == 0:
            return json.loads(result), befell
        print(f"{name}: {errors.strip().splitlines()[-1] if errors.strip() else 'killed'}", flush=True)
        # One that is told to end again in its last moments has no handler any more.
        assert command.returncode in (1, 130, -signal.SIGKILL, -signal.SIGTERM), errors


@pytest.mark.slow
def test_nothing_is_lost(tmp_path, monkeypatch):
    """Each run ends with the losses and weights of the one that nothing befell; no process and no folder is left."""
    started, draw, befell = time.monotonic(), Random(SEED), Counter[str]()
    print(f"seed {SEED}, {MINUTES:g} minutes")
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with real_nodes() as nodes, monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        whole = expertmesh_json(*RUN[:-1], "name=whole", "--address", nodes.there.address, folder=tmp_path, timeout=900)
        runs = 0
        while time.monotonic() - started < 60 * MINUTES:
            runs += 1
            result, happened = drilled(nodes, tmp_path, f"run{runs}", draw)
            assert_same_run(result, whole)
            befell += happened
            print(f"run {runs} is as if nothing had been: {dict(befell)}", flush=True)
    assert not {process.pid for process in psutil.Process().children(recursive=True)} - before
    # torch makes a cache for each user, in any process that has an optimizer.
    assert [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []
