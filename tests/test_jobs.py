"""Logs and the end of jobs that run here; tests/test_submit.py has those on a cluster."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from expertmesh.launch.jobs import log_file, show_file, show_log, stop_job
from expertmesh.launch.run_folder import REQUEST, lock_of


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "runs" / "a"
    (folder / "logs").mkdir(parents=True)
    (folder / "status.json").write_text("{}")
    for worker in ("trainer-0", "trainer-1", "ffn-12"):
        (folder / "logs" / f"{worker}.log").write_text(f"{worker} says\n")
    return folder


@pytest.mark.parametrize("worker, name", [("trainer:1", "trainer-1"), ("ffn:12", "ffn-12"), ("trainer-0", "trainer-0")])
def test_the_log_of_a_worker(run_dir, worker, name):
    assert log_file(run_dir, worker) == run_dir / "logs" / f"{name}.log"


@pytest.mark.parametrize(
    "worker, told",
    [("1", "give a worker as POOL:RANK"), ("trainer:x", "POOL:RANK"), ("trainer:9", "ffn:12, trainer:0, trainer:1")],
)
def test_a_worker_that_is_not_there(run_dir, worker, told):
    with pytest.raises(ValueError, match=told):
        log_file(run_dir, worker)


def test_the_log_of_a_run_here(run_dir):
    shown: list[str] = []
    show_log(str(run_dir), None, None, False, shown.append)
    assert shown == ["trainer-0 says\n"]


def test_following_ends_with_the_job_and_misses_nothing(run_dir):
    path, shown, asked = run_dir / "logs" / "trainer-0.log", list[str](), iter([True, True, False])

    def goes_on() -> bool:
        with path.open("a") as file:
            file.write("more\n")
        return next(asked)

    show_file(path, shown.append, goes_on)
    assert "".join(shown) == "trainer-0 says\n" + "more\n" * 3


def test_what_does_not_run_is_not_stopped(run_dir):
    with pytest.raises(ValueError, match="nothing trains in"):
        stop_job(str(run_dir), None)
    with pytest.raises(ValueError, match="no run of that name"):
        stop_job("elsewhere", None)


def test_a_run_here_is_asked_to_stop_and_waited_for(run_dir):
    with open(lock_of(run_dir), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="has not ended within 0 s"):
            stop_job(str(run_dir), None, seconds=0)
        (run_dir / REQUEST).unlink()

        def job() -> None:
            while not (run_dir / REQUEST).exists():
                pass
            fcntl.flock(held, fcntl.LOCK_UN)

        thread = threading.Thread(target=job)
        thread.start()
        assert stop_job(str(run_dir), None)["state"] == "STOPPED"
        thread.join()
