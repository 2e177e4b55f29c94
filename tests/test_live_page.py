"""The live page: it shows a run's folder as it is, follows it, and outlives its absence. No job is asked."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
from pathlib import Path

import httpx
import pytest
from commands import start_expertmesh
from fastapi.testclient import TestClient
from run_logs import START, step, validation, write_log
from test_report import Page
from typer.testing import CliRunner

from expertmesh.launch.cli import app
from expertmesh.launch.event_log import EventLog
from expertmesh.launch.live_page import MOST_EVENTS, MOST_WORKERS, build_app
from expertmesh.launch.recovery import Beat, FaultConfig, How, JobState, Left, advance, begin
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.whereabouts import Place


def job(workers: int) -> JobState:
    return begin(FaultConfig(), 200, ParallelSizes(dp=workers), (), 0.0)


def happens(state: JobState, *events: Beat | Left) -> JobState:
    for event in events:
        state, _ = advance(state, event, 1.0)
    return state


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "runs" / "mine"
    log = EventLog(folder)
    log.write({"what": "started", "epoch": 0})
    log.show(job(2))
    return folder


@pytest.fixture
def client(run_dir) -> TestClient:
    return TestClient(build_app(run_dir))


@pytest.fixture
def held(monkeypatch):
    """As if its job went on."""
    monkeypatch.setattr("expertmesh.launch.status.is_held", lambda folder: True)


def seen(client: TestClient) -> Page:
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    return Page(answer.text)


def test_a_run_from_its_first_second_to_its_last(run_dir, client, held, monkeypatch):
    log, words = EventLog(run_dir), seen(client).words
    assert "mine running 2 ranks: dp 2 waiting for trainer 0, 1 to start" in words
    assert (
        "Steps 0 of 200 planned" in words
        and "trainer 0 starting 0 none yet" in words
        and words.count("No step has been logged yet") == 3
    )

    at_work = happens(job(2), Beat(0, 1, 3, 2, Place("layer 1 dispatch", inside=True)), Beat(1, 1, 2, 1))
    log.show(at_work)
    write_log(run_dir, START, step(1, 7.0), step(2, 6.0), validation(2, 6.5))
    page = seen(client)
    for told in (
        "Loss 6.000",
        "Epoch 0 0 failures",
        "Held-out loss 6.500",
        "Steps 2 of 200",
        "Speed 5,002",
        ": 5.002 thousand",
    ):
        assert told in page.words, told
    assert "waiting for" not in page.words and "in layer 1 dispatch" in page.words
    assert page.words.index("trainer 1 at work 1") < page.words.index("trainer 0 at work 2"), "those behind come first"
    assert len(page.having("path", "curve")) == 3 and len(page.having("circle", "point")) == 1
    assert len(page.having("td", "cell")) == 12

    log.show(happens(at_work, Left(1, How.DIED, "died: <b>killed</b>")))
    log.write({"what": "failed", "epoch": 0, "step": 2, "why": "trainer 1 died: <b>killed</b>"})
    page = seen(client)
    assert "1 failure so far" in page.words and "waiting for trainer 0 to notice the loss of a peer" in page.words
    assert re.search(r"trainer 1 died 1 \S+ s before died: <b>killed</b>", page.words), (
        "what an error says is no markup"
    )
    assert "failed trainer 1 died: <b>killed</b> " in page.words

    monkeypatch.undo()
    log.write({"what": "gave up", "epoch": 0})
    page = seen(client)
    assert "quickstart failed" in page.words and "As last heard of" in page.words and "waiting for" not in page.words


def test_nothing_is_fetched_from_elsewhere(run_dir, client, held):
    write_log(run_dir, START, step(1))
    page = seen(client)
    assert not [attrs for _, attrs in page.tags if "src" in attrs or "href" in attrs]
    (policy,) = (attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "connect-src 'self'" in policy


def test_what_the_script_takes_over_is_there_from_the_start(run_dir, client, held):
    """It replaces each part by the new one of the same id, so none may come later, and none lie in another."""
    parts = [attrs["id"] for _, attrs in seen(client).tags if "id" in attrs]
    write_log(run_dir, START, step(1), validation(1, 6.0))
    assert [attrs["id"] for _, attrs in seen(client).tags if "id" in attrs] == parts
    assert parts == ["top", "figures", "workers", "loss", "speed", "experts", "wire", "events", "news"]


def test_a_page_of_many_workers_and_events_stays_short(run_dir, client, held):
    log = EventLog(run_dir)
    log.show(happens(job(100), *(Beat(rank, 1, 1, rank + 1) for rank in range(100)), Left(77, How.RAISED, "raised X")))
    for number in range(200):
        log.write({"what": "saved", "epoch": 0, "step": number})
    page = seen(client)
    assert page.words.count("trainer ") == MOST_WORKERS + 1, "one waits for others"
    assert page.words.index("trainer 77 raised") < page.words.index("trainer 0 at work")
    assert f"and {100 - MOST_WORKERS} more" in page.words and f"{201 - MOST_EVENTS} before these" in page.words
    assert page.words.index("0 199 saved") < page.words.index("0 198 saved"), "the newest comes first"


def test_the_layout_is_that_of_now(run_dir, client, held):
    write_log(run_dir, START, step(1))
    EventLog(run_dir).show(job(4))
    assert "mine running" not in seen(client).words and "quickstart running 4 ranks: dp 4" in seen(client).words


def test_for_prometheus(run_dir, client, held):
    write_log(run_dir, START, step(1, 7.0))
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'expertmesh_training_loss{run="mine"} 7.0' in answer.text.splitlines()


def test_a_folder_that_is_not_there_for_a_while(run_dir, client):
    aside = run_dir.with_name("aside")
    run_dir.rename(aside)
    for path in ("/", "/metrics"):
        answer = client.get(path)
        assert answer.status_code == 503 and "status.json" in answer.text
    shutil.copytree(aside, run_dir)
    assert "mine killed" in seen(client).words
    (run_dir / "status.json").write_text(json.dumps({})[:1])
    assert client.get("/").status_code == 503


def test_as_a_command(run_dir, tmp_path):
    """`expertmesh status mine --serve` says in one line where it answers, and does until it is interrupted."""
    command = start_expertmesh("status", "mine", "--serve", "--port", "0", "--json", folder=tmp_path)
    try:
        assert command.stdout is not None
        told = json.loads(command.stdout.readline())
        assert told["url"].startswith("http://127.0.0.1:"), "nobody else's business"
        assert "mine" in httpx.get(told["url"], timeout=20).text
        assert "expertmesh_training_step" in httpx.get(told["metrics"], timeout=20).text
    finally:
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=30)
    assert (command.returncode, errors) == (130, "expertmesh: interrupted\n")


def test_a_port_that_is_taken(run_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["status", str(run_dir), "--serve", "--port", str(port)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"expertmesh: cannot listen on 127.0.0.1:{port}") and done.stderr.count("\n") == 1
