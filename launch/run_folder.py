"""A run's folder as others than its job use it: found, seen to be held, and a place to leave a request.

../.NAME.lock     held by whoever trains, so that a killed job is not taken for one that goes on
request.json      {"experts_parallel": 4} or {"stop": true}; the job takes it away and does as it says
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from expertmesh.launch.event_log import STATUS, read_events

REQUEST = "request.json"


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


def ask_to_scale(run_dir: Path, experts_parallel: int) -> None:
    """Leave a request that the job in `run_dir` takes at its next step. Raises ValueError when none trains there."""
    if not is_held(run_dir):
        raise ValueError(f"nothing trains in {run_dir}; start it with parallel.ep={experts_parallel} and a fitting dp")
    ask(run_dir, {"experts_parallel": experts_parallel})


def ask(run_dir: Path, request: dict[str, Any]) -> None:
    """Leave a request; the job looks for one several times a second."""
    writing = run_dir / f"{REQUEST}.writing"
    writing.write_text(json.dumps(request))
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
