"""Where a run stands, from its folder alone: it may be on another machine, or long over.

status.json, events.jsonl    the coordinator's (launch/event_log.py)
metrics.jsonl                the figures of each step; its end is enough
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from expertmesh.launch.event_log import STATUS, read_events
from expertmesh.launch.run_folder import is_held

TAIL_BYTES = 1 << 20
RECENT_STEPS, RECENT_EVENTS = 20, 8
AWAY_S = 90.0  # a network file system shows what another host wrote up to a minute late


def status_of(run_dir: Path) -> dict[str, Any]:
    """What `expertmesh status --json` prints.

    "state": the phase of a job that goes on (see recovery.py), else finished, interrupted, failed, or what is left
    when nobody said why it ended: killed, or silent where another host trains, whose lock may not be seen from here.
    What an earlier version did not write is left empty.
    """
    told = json.loads((run_dir / STATUS).read_text())
    events = read_events(run_dir)
    steps = [record for record in _tail(run_dir / "metrics.jsonl") if record.get("kind") == "step"]
    last = steps[-1] if steps else {}
    loads = [layer["load_max_over_mean"] for layer in last.get("layers", [])]
    over = {"finished": "finished", "ended": "interrupted", "gave up": "failed"}
    final = over.get(events[-1]["what"]) if events else None
    silence = time.time() - told["updated"]
    elsewhere = told["host"] != socket.gethostname()
    goes_on = is_held(run_dir) or (elsewhere and final is None and silence < AWAY_S)
    return {
        "run_dir": str(run_dir),
        "state": told["phase"] if goes_on else final or ("silent" if elsewhere else "killed"),
        "goes_on": goes_on,
        "waiting_for": told["waiting_for"] if goes_on else None,
        "epoch": told["epoch"],
        "step": last.get("step", 0),
        "steps": told["steps"],
        "loss": last.get("loss"),
        "tokens_per_second": median(s["tokens_per_second"] for s in steps[-RECENT_STEPS:]) if steps else None,
        "load_max_over_mean": max(loads, default=None),
        "parallel": told["parallel"],
        "failures": sum(event["what"] == "failed" for event in events),
        "skipped": told["skipped"],
        "workers": [{"place": ""} | worker for worker in told["workers"]],
        "spares": told.get("spares", {}),
        "host": told["host"],
        "pid": told["pid"],
        "seconds_since_update": round(silence, 1),
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
    if any(status["spares"].values()):
        lines.append(f"spares: {', '.join(f'{count} {state}' for state, count in status['spares'].items() if count)}")
    if status["waiting_for"]:
        lines.append(f"waiting for {status['waiting_for']}")
    return "\n".join(lines)


def worker_table(status: dict[str, Any]) -> Table:
    table = Table("worker", "state", "step", "where", "last heartbeat", box=None, pad_edge=False)
    for worker in status["workers"]:
        state = f"{worker['state']}: {worker['why']}" if worker["why"] else worker["state"]
        seconds = f"{worker['seconds_since_heartbeat']:g} s before"
        table.add_row(f"trainer {worker['rank']}", state, str(worker["step"]), worker["place"], seconds)
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
