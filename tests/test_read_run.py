"""What a run has logged is read back as it was, whole or while it grows, whatever kills and resumes left in the log."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import pytest
from run_logs import START, routers, step, validation, write_log

from expertmesh.system.train.read_run import RunReader, imbalance, read_run


def append(folder: Path, content: bytes | dict) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(content if isinstance(content, bytes) else json.dumps(content).encode() + b"\n")


def steps(reader: RunReader) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in reader.read().steps]


def test_a_log_is_followed(tmp_path):
    reader = RunReader(tmp_path)
    assert reader.read().start == {} and steps(reader) == []
    write_log(tmp_path, START, step(1, 7.0))
    assert steps(reader) == [(1, 7.0)]
    line = json.dumps(step(2, 6.0)).encode() + b"\n"
    append(tmp_path, line[:40])
    assert steps(reader) == [(1, 7.0)], "a line that is being written waits for its end"
    append(tmp_path, line[40:])
    append(tmp_path, validation(2, 6.5))
    run = reader.read()
    assert [record["loss"] for record in run.steps] == [7.0, 6.0]
    assert [record["loss"] for record in run.validations] == [6.5] and run.load_LN == step(2)["load_LN"]
    append(tmp_path, step(2, 5.5, load_LN=[[1, 0, 0, 0, 0, 1]], layers=routers(7)))
    run = reader.read()
    assert [(record["step"], record["loss"]) for record in run.steps] == [(1, 7.0), (2, 5.5)] and not run.validations
    assert (run.load_LN, run.layers) == ([[1, 0, 0, 0, 0, 1]], routers(7))


def test_only_what_is_new_is_read(tmp_path):
    reader = RunReader(write_log(tmp_path, START, step(1, 7.0)))
    reader.read()
    with (tmp_path / "metrics.jsonl").open("r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(content.replace(b"7.0", b"9.0"))
    append(tmp_path, step(2, 6.0))
    assert steps(reader) == [(1, 7.0), (2, 6.0)]


def test_what_was_read_stays(tmp_path):
    """A page is made of one reading while the next goes on."""
    reader = RunReader(write_log(tmp_path, START, step(1), {"kind": "event", "what": "saved", "step": 1}))
    run = reader.read()
    append(tmp_path, step(1, 3.0))
    append(tmp_path, {"kind": "event", "what": "saved", "step": 1})
    reader.read()
    assert run.steps[0]["loss"] == 5.0 and len(run.events) == 1


OTHERS = {
    "another log in its place": lambda path: os.replace(
        write_log(path.parent / "new", START, *(step(n, 2.0) for n in (1, 2, 3))) / path.name, path
    ),
    "a shorter one": lambda path: write_log(path.parent, START),
    "none": lambda path: path.unlink(),
}


@pytest.mark.parametrize(
    "change, left", zip(OTHERS.values(), ([(1, 2.0), (2, 2.0), (3, 2.0)], [], []), strict=True), ids=OTHERS
)
def test_a_run_that_was_started_over_is_read_anew(tmp_path, change, left):
    (tmp_path / "new").mkdir()
    reader = RunReader(write_log(tmp_path, START, step(1, 7.0), step(2, 6.0)))
    assert len(steps(reader)) == 2
    change(tmp_path / "metrics.jsonl")
    assert steps(reader) == left


def test_random_resumes_leave_the_last_attempt(tmp_path):
    generator = random.Random(1)
    for _ in range(20):
        records, truth, at = [START], {}, 0
        for attempt in range(generator.randrange(1, 5)):
            begin, end = (generator.randrange(at) if at else 0), at + generator.randrange(1, 9)
            truth = {n: loss for n, loss in truth.items() if n <= begin}
            for number in range(begin + 1, end + 1):
                truth[number] = attempt + number / 100
                records.append(step(number, truth[number]))
            at = end
        run = read_run(write_log(tmp_path, *records))
        assert {record["step"]: record["loss"] for record in run.steps} == truth


def test_imbalance():
    assert imbalance([[30, 20, 10, 99], [10, 10, 10, 0]], 3) == pytest.approx(1.5)
    assert imbalance([[0, 0, 5], [3, 1, 5]], 2) == pytest.approx(1.5), "a layer without FFN slots says nothing"
    assert math.isnan(imbalance([[0, 0, 5]], 2))
