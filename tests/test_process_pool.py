"""Processes of this host are called, killed and replaced; how each ended is told."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from echo import Echo

from expertmesh.launch.process_pool import ProcessPool
from expertmesh.launch.worker_failed import WorkerFailed

COMES_S = 60.0  # for what is waited for, on a busy machine


@pytest.fixture
def pool(tmp_path) -> Iterator[ProcessPool]:
    made = ProcessPool("echo", Echo, 2, 0.5, "hello", spares=1, logs=tmp_path / "logs")
    yield made
    made.stop()


def ask(pool: ProcessPool, place: int, method: str, *arguments: Any) -> Any:
    return pool.answer(place, pool.call(place, method, *arguments), COMES_S)


def is_there(pid: int) -> bool:
    """Also of a process that is stopped, but not of one that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_is_asked_at_its_place_while_it_is_at_work(pool, tmp_path):
    work = pool.call(1, "wait")
    assert [ask(pool, place, "told") for place in range(3)] == [(0, "hello"), (1, "hello"), (2, "hello")]
    assert pool.answer(1, work, 0) is None and pool.wait([work], 0) == []
    ask(pool, 1, "go_on")
    assert pool.answer(1, work, COMES_S) == "waited" and pool.wait([work], 0) == [work]
    assert ask(pool, 2, "environment", "OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS", "1"), "of half a core"
    large = b"x" * 3_000_000  # more than a socket holds
    assert ask(pool, 0, "send", large) == large
    ask(pool, 2, "send", "a word")
    assert (tmp_path / "logs" / "echo-2.log").read_text() == "was sent a word\n"


def test_as_many_calls_are_waited_for_as_was_asked(pool):
    calls = [pool.call(place, "wait") for place in range(2)]
    assert ask(pool, 0, "go_on") is None
    assert pool.wait(calls, COMES_S) == calls[:1]
    began = time.monotonic()
    assert pool.wait(calls, 0.3, 2) == calls[:1] and time.monotonic() - began >= 0.3


def test_what_a_worker_raises_is_told_and_it_goes_on(pool, tmp_path):
    with pytest.raises(WorkerFailed, match=r"^echo 1 failed: ValueError: so it is$") as failure:
        ask(pool, 1, "fail", "so\nit is")
    assert isinstance(failure.value.cause, ValueError) and not failure.value.died
    with pytest.raises(WorkerFailed, match=r"^echo 1 failed: RuntimeError: Unsendable: \[brackets\] and lines$"):
        ask(pool, 1, "fail_unsendably")
    assert ask(pool, 1, "told") == (1, "hello")
    assert "Traceback (most recent call last)" in (tmp_path / "logs" / "echo-1.log").read_text()


ENDS = [
    (lambda pool, pid: os.kill(pid, signal.SIGKILL), "killed by SIGKILL"),
    (lambda pool, pid: pool.call(0, "leave", 3), "exit code 3"),
]


@pytest.mark.parametrize("end, told", ENDS, ids=[told for _, told in ENDS])
def test_a_death_is_told_of_every_call_and_of_later_ones(pool, end, told):
    pid = ask(pool, 0, "pid")
    calls = [pool.call(0, "wait"), pool.call(0, "wait")]
    end(pool, pid)
    assert pool.wait(calls, COMES_S, 2) == calls
    for call in (*calls, pool.call(0, "told")):
        with pytest.raises(WorkerFailed, match=f"^echo 0 died: {told}$") as failure:
            pool.answer(0, call, COMES_S)
        assert failure.value.died
    assert ask(pool, 1, "told") == (1, "hello"), "another is another"
    pool.replace(0)
    assert ask(pool, 0, "told") == (0, "hello") and ask(pool, 0, "pid") != pid


def test_one_that_is_stopped_is_killed(pool):
    pid = ask(pool, 0, "pid")
    work = pool.call(0, "wait")
    os.kill(pid, signal.SIGSTOP)
    pool.kill(0)
    with pytest.raises(WorkerFailed, match="killed by SIGKILL"):
        pool.answer(0, work, COMES_S)


def test_none_is_left_when_the_pool_stops(pool):
    pids = [ask(pool, place, "pid") for place in range(3)]
    os.kill(pids[1], signal.SIGSTOP)
    pool.stop()
    assert not [pid for pid in pids if is_there(pid)]


def hold(logs: Path, told: Any) -> None:
    pool = ProcessPool("echo", Echo, 2, 1, "hello", logs=logs)
    told.send([ask(pool, place, "pid") for place in range(2)])
    time.sleep(600)


def test_workers_end_with_whoever_started_them(tmp_path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(tmp_path, theirs), daemon=True)
    holder.start()
    pids = ours.recv()
    holder.kill()
    deadline = time.monotonic() + COMES_S
    while any(is_there(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive who started them"
        time.sleep(0.02)


def test_ctrl_c_is_not_for_workers(pool):
    """They are asked to save and leave; on a terminal it goes to the whole group of processes."""
    assert os.getpgid(ask(pool, 0, "pid")) != os.getpgid(0)


def test_gpus_are_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told = r"pool echo asks for 2 workers and 1 spares with a GPU each; this host has 2 \(CUDA_VISIBLE_DEVICES= does"
    with pytest.raises(WorkerFailed, match=told):
        ProcessPool("echo", Echo, 2, 1, "hello", spares=1, logs=tmp_path)
