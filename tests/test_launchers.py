"""A job on plain processes does all that it does on Ray, with the same losses to the last bit.

That Ray's workers train the same: tests/test_cli.py. Ranks that somebody else has started: tests/test_started_ranks.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import environment

from expertmesh.launch.event_log import read_events
from expertmesh.launch.recipe import load_recipe
from expertmesh.launch.run_folder import ask
from expertmesh.launch.status import status_of
from expertmesh.launch.train_job import find_start, prepare_data, run_job, sole_user
from expertmesh.system.train.snapshot import read_state
from expertmesh.system.train.trainer import Record

SHORT = ("train.steps=12", "train.checkpoint_every=4", "train.validate_every=12", "cluster.launcher=processes")
PROGRAM = """
import sys, expertmesh.launch.cli as cli
cli.app(sys.argv[1:], standalone_mode=False)
print("LOADED", "ray" in sys.modules)
"""


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, "train", "tiny.yaml", *SHORT, "--json"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)
    result, loaded = done.stdout.splitlines()
    return json.loads(result) | {"loaded": loaded}


def train(folder: Path, *changes: str, watch: Any = lambda record: None) -> dict[str, Any]:
    """As the verb does, in this process."""
    recipe = load_recipe(str(folder / "tiny.yaml"), [f"run_dir={folder}/runs/{{name}}", *SHORT, *changes])
    with sole_user(recipe):
        start = find_start(recipe, False)
        return run_job(recipe, start, prepare_data(recipe, start, watch), watch)


def assert_same_run(run: dict[str, Any], other: dict[str, Any]) -> None:
    """Losses, and a file of weights, bit for bit."""
    assert run["losses"] == other["losses"] and run["validation_loss"] == other["validation_loss"]
    mine, theirs = (Path(each["checkpoint"]) / "model-00002-of-00002.safetensors" for each in (run, other))
    assert mine.read_bytes() == theirs.read_bytes()


def workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "expertmesh.launch.worker_process" in process.cmdline()]


def test_nothing_of_ray_is_loaded(trained):
    assert trained["loaded"] == "LOADED False"
    logs = Path(trained["run_dir"]) / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["trainer-0.log", "trainer-1.log"]


def test_a_worker_that_dies_and_one_that_hangs_change_not_a_bit(folder, trained):
    """A spare takes the rank of the first."""
    run_dir = folder / "runs" / "drilled"
    shown: list[Record] = []
    drills = ("chaos.kill=trainer:1@step=6", "chaos.stop=trainer:0@step=7", "fault.stall_s=3.5", "fault.spares=1")
    result = train(folder, "name=drilled", *drills, watch=shown.append)
    assert_same_run(result, trained)
    events = read_events(run_dir)
    first, _ = (event for event in events if event["what"] == "re-formed")
    assert (first["kept"], first["spares"]) == ([0], [1])
    failed = [event["why"] for event in events if event["what"] == "failed"]
    assert failed[0].startswith("trainer 1 died: killed") and failed[1].startswith("trainer 0 hangs: no heartbeat")
    assert {record["step"] for record in shown if record["kind"] == "step"} == set(range(1, 13))
    assert "most recent call first" in (run_dir / "logs" / "trainer-1.log").read_text(), "no stacks of a hanging job"
    assert not workers()


def test_a_running_job_is_scaled_and_stopped(folder, trained):
    run_dir = folder / "runs" / "scaled"
    loaded: list[str] = []

    def watch(record: Record) -> None:
        if record["kind"] != "step":
            return
        if status_of(run_dir)["epoch"]:
            ask(run_dir, {"stop": True})
        elif record["step"] == 1:
            loaded.extend(path.path for worker in workers() for path in worker.memory_maps())
            ask(run_dir, {"experts_parallel": 1})

    with pytest.raises(KeyboardInterrupt):
        train(folder, "name=scaled", "train.steps=60", "train.checkpoint_every=100", watch=watch)
    assert any("torch" in path for path in loaded) and not any("_raylet" in path for path in loaded)
    (formed,) = [event for event in read_events(run_dir) if event["what"] == "re-formed"]
    assert (formed["parallel"]["dp"], formed["parallel"]["ep"]) == (1, 1)
    assert status_of(run_dir)["state"] == "interrupted"
    assert formed["step"] < read_state(run_dir / "checkpoint").step < 60
    assert not workers()
