"""Where a run stands, told by its files: while it trains, when it has ended, and when it was killed in the middle."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from expertmesh.launch.event_log import STATUS, EventLog, read_events
from expertmesh.launch.recovery import Beat, FaultConfig, How, Left, Spares, advance, begin
from expertmesh.launch.run_folder import lock_of
from expertmesh.launch.status import (
    AWAY_S,
    TAIL_BYTES,
    event_table,
    status_of,
    summary,
    worker_table,
)
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.whereabouts import Place


def step(number: int) -> dict:
    layers = [{"load_max_over_mean": 1.5}, {"load_max_over_mean": 1.0 + number}]
    return {"kind": "step", "step": number, "loss": 7.0 - number, "tokens_per_second": 100.0 * number, "layers": layers}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "runs" / "a"
    log = EventLog(folder)
    state = begin(FaultConfig(), 9, ParallelSizes(dp=2), (), 0.0)
    for event in (Spares(ready=2, starting=1), Beat(0, 1, 3, 3), Beat(1, 1, 2, 2), Left(1, How.DIED, "died")):
        state, _ = advance(state, event, 1.0)
    log.write({"what": "started", "epoch": 0})
    log.write({"what": "failed", "epoch": 0, "step": 3, "why": "trainer 1 died"})
    log.show(state)
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"kind": "start"}) + "\n")
        for number in (1, 2, 3):
            file.write(json.dumps(step(number)) + "\n")
        file.write('{"kind": "ste')
    return folder


def test_while_it_trains(run_dir):
    with open(lock_of(run_dir), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = status_of(run_dir)
    assert (found["state"], found["step"], found["steps"], found["failures"]) == ("settling", 3, 9, 1)
    assert (found["loss"], found["tokens_per_second"], found["load_max_over_mean"]) == (4.0, 200.0, 4.0)
    assert found["waiting_for"] == "trainer 0 to notice the loss of a peer"
    assert [worker["state"] for worker in found["workers"]] == ["at work", "died"]
    assert found["spares"] == {"ready": 2, "starting": 1, "lost": 0}


ENDS = [("finished", "finished"), ("ended", "interrupted"), ("gave up", "failed"), ("saved", "killed")]


@pytest.mark.parametrize("last, state", ENDS, ids=[state for _, state in ENDS])
def test_when_nobody_trains(run_dir, last, state):
    EventLog(run_dir).write({"what": last, "epoch": 0})
    found = status_of(run_dir)
    assert found["state"] == state and found["waiting_for"] is None


FROM_ELSEWHERE = [  # seconds since its last word, the last event, state
    (5, "failed", "settling", "its lock is not seen from here, its word is"),
    (AWAY_S + 60, "failed", "silent", "nobody here can know that it was killed"),
    (5, "finished", "finished", "it said so"),
]


@pytest.mark.parametrize("silence, last, state, reason", FROM_ELSEWHERE, ids=[case[3] for case in FROM_ELSEWHERE])
def test_of_a_run_on_another_host(run_dir, silence, last, state, reason):
    EventLog(run_dir).write({"what": last, "epoch": 0})
    told = json.loads((run_dir / STATUS).read_text())
    (run_dir / STATUS).write_text(json.dumps(told | {"host": "elsewhere", "updated": time.time() - silence}))
    found = status_of(run_dir)
    assert (found["state"], found["goes_on"]) == (state, state == "settling")
    assert bool(found["waiting_for"]) == found["goes_on"]


def test_where_each_worker_is(run_dir):
    state = begin(FaultConfig(), 9, ParallelSizes(dp=3), (), 0.0)
    for event in (Beat(0, 1, 3, 3, Place("layer 1 dispatch", True)), Beat(1, 1, 3, 3), Left(1, How.DIED, "died")):
        state, _ = advance(state, event, 1.0)
    EventLog(run_dir).show(state)
    assert [worker["place"] for worker in status_of(run_dir)["workers"]] == ["in layer 1 dispatch", "", ""]


def test_of_a_folder_that_an_earlier_version_wrote(run_dir):
    told = json.loads((run_dir / STATUS).read_text())
    del told["spares"]
    for worker in told["workers"]:
        del worker["place"]
    (run_dir / STATUS).write_text(json.dumps(told))
    found = status_of(run_dir)
    assert "spares" not in summary(found) and worker_table(found).row_count == len(told["workers"]) > 0


def test_for_a_person(run_dir):
    found = status_of(run_dir)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(summary(found), worker_table(found), event_table(found))
    told = console.export_text()
    for part in (
        "killed",
        "step 3/9",
        "loss 4.000",
        "200 tokens/s",
        "4.0x",
        "trainer 1",
        "died",
        "failed",
        "spares: 2 ready, 1 starting",
    ):
        assert part in told, part


def test_before_the_first_step(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    found = status_of(run_dir)
    assert found["loss"] is None and found["step"] == 0 and "loss -" in summary(found)


def test_a_long_log_is_read_from_its_end(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("\n")
        for number in range(4, 9000):
            file.write(json.dumps(step(number)) + "\n")
    assert (run_dir / "metrics.jsonl").stat().st_size > TAIL_BYTES
    assert status_of(run_dir)["step"] == 8999


def test_events_torn_by_a_kill_are_left_out(run_dir):
    with (run_dir / "events.jsonl").open("a") as file:
        file.write('{"what": "fini')
    assert [event["what"] for event in read_events(run_dir)] == ["started", "failed"]
