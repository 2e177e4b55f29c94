"""Where a run stands, from its folder alone: it may be on another machine, or long over.

status.json, events.jsonl    the coordinator's (launch/event_log.py)
metrics.jsonl                the figures of each step; its end is enough
../.NAME.lock                held by whoever trains, so that a killed job is not taken for one that goes on
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from expertmesh.launch.event_log import STATUS, read_events
from expertmesh.system.model.checkpoint import write_json

REQUEST = "request.json"  # in the run's folder: {"experts_parallel": 4} or {"stop": true}; the job takes it away
TAIL_BYTES = 1 << 20
RECENT_STEPS, RECENT_EVENTS = 20, 8


def find_run(run: str) -> Path:
    """The folder of a run, given that or its name. Raises ValueError where there is none."""
    for folder in (Path(run), Path("runs") / run):
        if (folder / STATUS).is_file():
            return folder.absolute()
    raise ValueError(f"{run}: no run of that name here, and no folder of one ({STATUS} is missing)")


def lock_of(run_dir: Path) -> Path:
    """The file that a job holds as long as it trains in `run_dir`."""
    return run_dir.parent / f".{run_dir.name}.lock"


def is_held(run_dir: Path) -> bool:
    """Whether a job trains in it now."""
    try:
        with open(lock_of(run_dir)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def status_of(run_dir: Path) -> dict[str, Any]:
    """What `expertmesh status --json` prints."""
    told = json.loads((run_dir / STATUS).read_text())
    events = read_events(run_dir)
    steps = [record for record in _tail(run_dir / "metrics.jsonl") if record.get("kind") == "step"]
    last = steps[-1] if steps else {}
    loads = [layer["load_max_over_mean"] for layer in last.get("layers", [])]
    over = {"finished": "finished", "ended": "interrupted", "gave up": "failed"}
    final = over.get(events[-1]["what"]) if events else None
    held = is_held(run_dir)
    return {
        "run_dir": str(run_dir),
        "state": told["phase"] if held else final or "killed",
        "waiting_for": told["waiting_for"] if held else None,
        "epoch": told["epoch"],
        "step": last.get("step", 0),
        "steps": told["steps"],
        "loss": last.get("loss"),
        "tokens_per_second": median(s["tokens_per_second"] for s in steps[-RECENT_STEPS:]) if steps else None,
        "load_max_over_mean": max(loads, default=None),
        "parallel": told["parallel"],
        "failures": sum(event["what"] == "failed" for event in events),
        "skipped": told["skipped"],
        "workers": told["workers"],
        "host": told["host"],
        "pid": told["pid"],
        "seconds_since_update": round(time.time() - told["updated"], 1),
        "events": events[-RECENT_EVENTS:],
    }


def _tail(path: Path) -> Iterator[dict[str, Any]]:
    """The records at the end of a file of JSON lines; the first line may be cut, and the last not yet whole."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def summary(status: dict[str, Any]) -> str:
    """The figures in a few lines."""

    def figure(key: str, form: str) -> str:
        return "-" if status[key] is None else format(status[key], form)

    lines = [
        f"{status['run_dir']}   {status['state']}   step {status['step']}/{status['steps']}   epoch {status['epoch']}"
        f"   failures {status['failures']}",
        f"loss {figure('loss', '.3f')}   {figure('tokens_per_second', ',.0f')} tokens/s   "
        f"busiest expert {figure('load_max_over_mean', '.1f')}x   on {status['host']}, process {status['pid']}",
    ]
    if status["waiting_for"]:
        lines.append(f"waiting for {status['waiting_for']}")
    return "\n".join(lines)


def worker_table(status: dict[str, Any]) -> Table:
    table = Table("worker", "state", "step", "last heartbeat", box=None, pad_edge=False)
    for worker in status["workers"]:
        state = f"{worker['state']}: {worker['why']}" if worker["why"] else worker["state"]
        seconds = f"{worker['seconds_since_heartbeat']:g} s before"
        table.add_row(f"trainer {worker['rank']}", state, str(worker["step"]), seconds)
    return table


def event_table(status: dict[str, Any]) -> Table:
    table = Table("time", "epoch", "step", "what", "why", box=None, pad_edge=False)
    for event in status["events"]:
        cells = (
            event["time"][11:19],
            event.get("epoch", ""),
            event.get("step", ""),
            event["what"],
            event.get("why", ""),
        )
        table.add_row(*map(str, cells))
    return table


def ask_to_scale(run_dir: Path, experts_parallel: int) -> None:
    """Leave a request that the job in `run_dir` takes at its next step. Raises ValueError when none trains there."""
    if not is_held(run_dir):
        raise ValueError(f"nothing trains in {run_dir}; start it with parallel.ep={experts_parallel} and a fitting dp")
    ask(run_dir, {"experts_parallel": experts_parallel})


def ask(run_dir: Path, request: dict[str, Any]) -> None:
    """Leave a request; the job looks for one several times a second."""
    writing = run_dir / f"{REQUEST}.writing"
    write_json(request, writing)
    os.replace(writing, run_dir / REQUEST)


def await_scale(run_dir: Path, known: int, seconds: float = 600.0) -> dict[str, Any]:
    """Wait until the job has re-formed; `known`: how many events there were before it was asked.

    Returns the event that tells of it. Raises ValueError when the job cannot, RuntimeError when it ends before.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for event in read_events(run_dir)[known:]:
            if event["what"] == "re-formed":
                return event
            if event["what"] == "not resized":
                raise ValueError(event["why"])
        if not is_held(run_dir):
            raise RuntimeError(f"the job in {run_dir} ended before it changed")
        time.sleep(0.2)
    raise RuntimeError(f"the job in {run_dir} did not change within {seconds:g} s; it goes on")
