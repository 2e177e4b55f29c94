"""Jobs that run, here or on a Ray cluster: listed, read, and ended so that nothing is lost.

A job is told to end by a request in its run's folder, as it is told to change its size: it saves at the end of a step.
Ray's own way kills it three seconds after asking, saved or not, and is what is left for one that does not answer.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from expertmesh.launch.ray_cluster import submission_client
from expertmesh.launch.run_folder import ask, find_run, is_held

INTERRUPTED = 130  # the exit code of a job that was told to end
_WORKER = re.compile(r"([a-z]+)[:-](\d+)")


def list_jobs(address: str) -> list[dict[str, Any]]:
    """The jobs that the cluster knows, newest first. Raises ValueError when no dashboard answers at `address`."""
    jobs = [_told(info) for info in submission_client(address).list_jobs() if info.submission_id]
    return sorted(jobs, key=lambda job: job["started"] or "", reverse=True)


def _told(info: Any) -> dict[str, Any]:
    metadata = info.metadata or {}
    state = str(getattr(info.status, "value", info.status))
    return {
        "job": info.submission_id,
        "name": metadata.get("name"),
        "run_dir": metadata.get("run_dir"),
        "state": "STOPPED" if info.driver_exit_code == INTERRUPTED else state,
        "exit_code": info.driver_exit_code,
        "started": _time(info.start_time),
        "ended": _time(info.end_time),
        "message": (info.message or "").strip().splitlines()[-1] if info.message else None,
    }


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def find_job(job: str, address: str) -> dict[str, Any]:
    """A job by its id. Raises ValueError, which lists those that there are."""
    jobs = list_jobs(address)
    for told in jobs:
        if told["job"] == job:
            return told
    known = ", ".join(told["job"] for told in jobs) or "none"
    raise ValueError(f"no job {job!r} at {address}; there are: {known}")


def is_over(told: dict[str, Any]) -> bool:
    return told["state"] in ("SUCCEEDED", "FAILED", "STOPPED")


def log_file(run_dir: Path, worker: str) -> Path:
    """The log of one worker, such as "trainer:1". Raises ValueError, which lists those that there are."""
    found = _WORKER.fullmatch(worker)
    if found is None:
        raise ValueError(f"--rank {worker}: give a worker as POOL:RANK, such as trainer:1")
    path = run_dir / "logs" / f"{found[1]}-{found[2]}.log"
    if not path.is_file():
        there = ", ".join(sorted(p.stem.replace("-", ":") for p in (run_dir / "logs").glob("*.log"))) or "none"
        raise ValueError(f"--rank {worker}: no log {path}; there are: {there}")
    return path


def show_file(path: Path, show: Callable[[str], None], goes_on: Callable[[], bool]) -> None:
    """Show a file, and what is added to it as long as `goes_on`."""
    with path.open(errors="replace") as file:
        while True:
            more = goes_on()  # asked first: what was written before the end is read after it
            while text := file.read(1 << 16):
                show(text)
            if not more:
                return
            time.sleep(0.2)


def show_log(job: str, address: str | None, worker: str | None, follow: bool, show: Callable[[str], None]) -> None:
    """Show the log of a job, or of one of its workers. `address` None: `job` is a run here, rank 0's log by default.

    Raises ValueError for what is not there.
    """
    if address is None:
        run_dir = find_run(job)
        show_file(log_file(run_dir, worker or "trainer:0"), show, lambda: follow and is_held(run_dir))
        return
    told = find_job(job, address)
    if worker is not None:
        run_dir = _visible(told)
        path = log_file(run_dir, worker)
        show_file(path, show, lambda: follow and not is_over(find_job(job, address)))
    elif follow:
        from expertmesh.launch.submit import Job

        Job(submission_client(address), job).show(show)
    else:
        show(submission_client(address).get_job_logs(job))


def _visible(told: dict[str, Any]) -> Path:
    folder = Path(told["run_dir"] or "")
    if not told["run_dir"] or not folder.is_dir():
        raise ValueError(f"job {told['job']} trains in {told['run_dir']}, which is not to be seen from here")
    return folder


def stop_job(job: str, address: str | None, seconds: float = 120.0) -> dict[str, Any]:
    """Have a job save and end; returns how it ended. A job that does not within `seconds` is ended by Ray.

    Raises ValueError for a job that is not there, or over.
    """
    if address is None:
        run_dir = find_run(job)
        if not is_held(run_dir):
            raise ValueError(f"nothing trains in {run_dir}")
        ask(run_dir, {"stop": True})
        if not _wait(lambda: not is_held(run_dir), seconds):
            raise RuntimeError(f"{run_dir} has not ended within {seconds:g} s; kill its process if it must")
        return {"job": job, "run_dir": str(run_dir), "state": "STOPPED"}
    told = find_job(job, address)
    if is_over(told):
        raise ValueError(f"job {job} is over: {told['state']}")
    run_dir = Path(told["run_dir"] or "")
    trains = bool(told["run_dir"]) and is_held(run_dir)
    if trains:
        ask(run_dir, {"stop": True})
    if not trains or not _wait(lambda: is_over(find_job(job, address)), seconds):
        submission_client(address).stop_job(job)
        _wait(lambda: is_over(find_job(job, address)), 30)
    return find_job(job, address)


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True
