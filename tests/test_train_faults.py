"""A training job that loses workers, gains some, or is told to end: it goes on by itself, and to the same weights."""

from __future__ import annotations

import re

import pytest
from commands import assert_same_run, expertmesh_json, start_expertmesh, wait_until

from expertmesh.launch.event_log import read_events
from expertmesh.launch.run_folder import ask_to_scale, await_scale
from expertmesh.launch.status import status_of
from expertmesh.system.train.snapshot import read_state


def test_a_worker_that_dies_and_one_that_hangs_change_not_a_bit(folder, trained):
    """The job goes on by itself."""
    run_dir = folder / "runs" / "drilled"
    drills = ("chaos.kill=trainer:1@step=17", "chaos.stop=trainer:0@step=29", "fault.stall_s=8")
    resumed = expertmesh_json("train", "tiny.yaml", "name=drilled", *drills, folder=folder)
    assert [event["what"] for event in resumed["events"]].count("re-formed") == 2
    failed = [event["why"] for event in read_events(run_dir) if event["what"] == "failed"][-2:]
    assert failed[0].startswith("trainer 1 died") and failed[1].startswith("trainer 0 hangs: no heartbeat")
    (hang,) = [event["why"] for event in read_events(run_dir) if event["what"] == "hangs"]
    assert re.fullmatch(r"rank 0 silent, last heard of in step .*; rank 1 waited in step 29, in layer 0 counts", hang)
    assert "most recent call first" in (run_dir / "logs" / "trainer-1.log").read_text(), "no stacks of a hanging job"
    assert_same_run(resumed, trained)


def test_a_spare_goes_on_for_a_worker_that_dies_bit_for_bit(folder, trained):
    run_dir = folder / "runs" / "spared"
    resumed = expertmesh_json(
        "train", "tiny.yaml", "name=spared", "fault.spares=1", "chaos.kill=trainer:1@step=17", folder=folder
    )
    (formed,) = [event for event in resumed["events"] if event["what"] == "re-formed"]
    assert formed["kept"] == [0] and formed["spares"] == [1]
    assert set(status_of(run_dir)["spares"]) == {"ready", "starting", "lost"}
    assert_same_run(resumed, trained)


def test_a_job_shrinks_to_the_workers_that_are_left(folder, trained):
    """Of another size, sums are made in another order: losses differ by rounding, growing with the steps."""
    drill = ("fault.policy=shrink", "chaos.kill=trainer:1@step=17", "train.checkpoint_every=10")
    shrunk = expertmesh_json("train", "tiny.yaml", "name=shrunk", *drill, folder=folder)
    (formed,) = [event for event in shrunk["events"] if event["what"] == "re-formed"]
    assert (formed["parallel"]["dp"], formed["parallel"]["ep"], formed["kept"]) == (1, 1, [])
    assert formed["step"] in (0, 10) and shrunk["steps"] == 30
    assert shrunk["losses"] == pytest.approx(trained["losses"], rel=1e-4)
    assert shrunk["losses"][: formed["step"]] == trained["losses"][: formed["step"]]
    assert shrunk["validation_loss"] == pytest.approx(trained["validation_loss"], rel=1e-4)


def test_a_running_job_grows_and_saves_when_it_is_told_to_end(folder, trained):
    """Of another size, sums are made in another order: losses differ by rounding, growing with the steps."""
    run_dir = folder / "runs" / "scaled"
    command = start_expertmesh("train", "tiny.yaml", "name=scaled", "train.checkpoint_every=100", folder=folder)
    wait_until(lambda: (run_dir / "status.json").is_file(), "no status")
    ask_to_scale(run_dir, 4)  # the verb does this and waits; 30 steps would be over before it has started
    grown = await_scale(run_dir, 0)
    assert grown["parallel"]["ep"] == grown["parallel"]["dp"] == 4 and grown["kept"] == []
    wait_until(lambda: status_of(run_dir)["step"] > grown["step"], "no step of the larger job")
    command.terminate()
    found = status_of(run_dir)
    assert found["state"] == "running" and len(found["workers"]) == 4 and found["epoch"] == 1
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 130, errors
    assert expertmesh_json("status", "scaled", folder=folder)["state"] == "interrupted"
    saved = read_state(run_dir / "checkpoint").step
    assert grown["step"] < saved < 30, "it was to save where no checkpoint was due"
    resumed = expertmesh_json("train", "tiny.yaml", "name=scaled", folder=folder)
    assert resumed["losses"] == pytest.approx(trained["losses"], rel=1e-4)
    assert resumed["losses"][: grown["step"]] == trained["losses"][: grown["step"]]
