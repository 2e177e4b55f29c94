"""Runs are found, and what is asked of one is answered, or said to be in vain."""

from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.launch.event_log import EventLog, read_events
from expertmesh.launch.recovery import FaultConfig, begin
from expertmesh.launch.run_folder import ask_to_scale, await_scale, find_run
from expertmesh.parallel.sizes import ParallelSizes


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "runs" / "a"
    log = EventLog(folder)
    log.write({"what": "started", "epoch": 0})
    log.show(begin(FaultConfig(), 9, ParallelSizes(dp=2), (), 0.0))
    return folder


def test_a_run_is_found_by_folder_and_by_name(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.parent.parent)
    assert find_run("a") == find_run("runs/a") == run_dir
    with pytest.raises(ValueError, match="no run of that name here"):
        find_run("b")


def test_only_a_job_that_trains_can_be_scaled(run_dir):
    with pytest.raises(ValueError, match="nothing trains in"):
        ask_to_scale(run_dir, 4)


ANSWERS = [
    ({"what": "re-formed", "epoch": 1}, None, ""),
    ({"what": "not resized", "why": "ep=3 does not divide"}, ValueError, "ep=3 does not divide"),
    ({"what": "saved"}, RuntimeError, "ended before it changed"),
]


@pytest.mark.parametrize("event, error, told", ANSWERS, ids=["it did", "it cannot", "it is gone"])
def test_what_became_of_a_request(run_dir, event, error, told):
    known = len(read_events(run_dir))
    EventLog(run_dir).write(event)
    if error is None:
        assert await_scale(run_dir, known)["epoch"] == 1
        return
    with pytest.raises(error, match=told):
        await_scale(run_dir, known)
