"""What happened to a job, and where it stands: two files in the run's folder that anybody may read while it goes on.

events.jsonl     a line for each thing that happened: {"time": ..., "what": ..., "epoch": ..., ...}
status.json      the present: phase, epoch, workers, what is waited for; replaced as a whole
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from expertmesh.launch.recovery import JobState, waiting_for

EVENTS, STATUS = "events.jsonl", "status.json"
STATUS_EVERY_S = 1.0


class EventLog:
    """The coordinator's side of both files."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._written = float("-inf")
        self._last: tuple[Any, ...] = ()
        self.waits_for: str | None = None  # as last shown

    def write(self, record: dict[str, Any]) -> None:
        """Add an event. The file is opened anew each time: a disk that was full once is not full for ever."""
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record})
        with open(self._run_dir / EVENTS, "a") as file:
            file.write(line + "\n")

    def show(self, state: JobState) -> None:
        """Bring status.json up to date, at once when the phase or what is waited for changes."""
        told = self.waits_for = waiting_for(state)
        key = (state.phase, state.epoch, told)
        now = time.monotonic()
        if key == self._last and now - self._written < STATUS_EVERY_S:
            return
        self._last, self._written = key, now
        content = {
            "updated": time.time(),
            "phase": state.phase.value,
            "epoch": state.epoch,
            "waiting_for": told,
            "parallel": state.sizes.model_dump(mode="json"),
            "step": state.step,
            "steps": state.steps,
            "failures": len(state.failures),
            "skipped": sorted(state.skip),
            "spares": state.spares._asdict(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "workers": [
                {
                    "rank": rank,
                    "state": member.left.value if member.left else "at work" if member.beat else "starting",
                    "step": member.step,
                    "place": str(member.place) if member.beat and not member.left else "",
                    "seconds_since_heartbeat": round(now - member.beat_at, 1),
                    "why": member.why,
                }
                for rank, member in enumerate(state.members)
            ],
        }
        path = self._run_dir / STATUS
        writing = path.with_name(path.name + ".writing")
        try:
            writing.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(writing, path)
        except OSError:  # a full disk: a job does not end for its status
            writing.unlink(missing_ok=True)


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; lines torn by a kill are left out."""
    path = run_dir / EVENTS
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
