"""The log of a run: one JSON line a record, and TensorBoard scalars; both survive a kill and a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from expertmesh.system.train.run_log import LAYER_SCALARS, SCALARS, RunLog

LAYERS = [
    dict.fromkeys(LAYER_SCALARS, 0.25) | {"layer": 1, "load_max_over_mean": 1.5},
    dict.fromkeys(LAYER_SCALARS, 0.5) | {"layer": 3, "router_entropy": 0.125},
]


def step(number: int, loss: float) -> dict[str, Any]:
    record: dict[str, Any] = dict.fromkeys(SCALARS, 0.25)
    return record | {
        "kind": "step",
        "step": number,
        "loss": loss,
        "load_LN": [[1, 3], [2, 2]],
        "layers": LAYERS,
    }


def validation(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "validation", "step": number, "loss": loss}


def log(run_dir: Path, records: list[dict[str, Any]], first_step: int = 1) -> None:
    with RunLog(run_dir, first_step) as run_log:
        for record in records:
            run_log.write(record)


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_records_and_scalars(tmp_path):
    records = [
        {"kind": "start", "run": "a"},
        step(1, 3.5),
        step(2, 3.0),
        validation(2, 3.25),
        {"kind": "event", "what": "saved", "step": 2},
    ]
    log(tmp_path, records)
    assert [json.loads(line) for line in lines(tmp_path)] == records
    assert scalars(tmp_path, "train/loss") == [(1, 3.5), (2, 3.0)]
    assert scalars(tmp_path, "validation/loss") == [(2, 3.25)]
    assert scalars(tmp_path, "load_max_over_mean/layer_1") == [(1, 1.5), (2, 1.5)]
    assert scalars(tmp_path, "router_entropy/layer_3") == [(1, 0.125), (2, 0.125)]
    for summary in LAYERS:
        assert all(len(scalars(tmp_path, f"{name}/layer_{summary['layer']}")) == 2 for name in LAYER_SCALARS)
    assert all(len(scalars(tmp_path, f"train/{name}")) == 2 for name in SCALARS)


def test_a_record_is_on_disk_before_the_next(tmp_path):
    with RunLog(tmp_path, 1) as run_log:
        run_log.write(step(1, 3.5))
        assert json.loads(lines(tmp_path)[0])["step"] == 1


def test_a_resumed_run_appends(tmp_path):
    log(tmp_path, [step(1, 3.5), step(2, 3.0), step(3, 9.0)])
    log(tmp_path, [step(3, 2.5)], first_step=3)
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2, 3, 3]
    assert scalars(tmp_path, "train/loss") == [(1, 3.5), (2, 3.0), (3, 2.5)]  # what was done again is overwritten


LEFT = [
    ("", "an empty file"),
    ('{"kind": "start"}\n', "a whole line"),
    ('{"kind": "start"}\n{"kind": "st', "half a line: it is lost, the next is not"),
]


@pytest.mark.parametrize("left, reason", LEFT, ids=[reason for _, reason in LEFT])
def test_what_a_kill_left_does_not_spoil_the_next_record(tmp_path, left, reason):
    (tmp_path / "metrics.jsonl").write_text(left)
    log(tmp_path, [step(2, 3.0)], first_step=2)
    assert lines(tmp_path)[:-1] == left.splitlines()
    assert json.loads(lines(tmp_path)[-1])["step"] == 2
