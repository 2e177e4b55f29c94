"""A recipe sent to a running Ray cluster trains there, and its checkpoint is where the recipe says."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml
from commands import TINY_RECIPE, expertmesh, expertmesh_json, start_expertmesh

from expertmesh.launch import local_cluster
from expertmesh.launch.jobs import find_job, list_jobs, show_log, stop_job
from expertmesh.launch.local_cluster import LocalCluster
from expertmesh.launch.recipe import load_recipe
from expertmesh.launch.status import status_of
from expertmesh.launch.submit import Job, RemoteJobFailed, as_sent, choose_id


@pytest.mark.parametrize("start_from", [[], ["start_from=theirs"]], ids=["a model of its own", "from a checkpoint"])
def test_what_is_sent_says_the_same_elsewhere(tmp_path, monkeypatch, start_from):
    plain = {key: value for key, value in yaml.safe_load(TINY_RECIPE).items() if not (start_from and key == "model")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(plain))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("tiny.yaml", [*start_from, "data.source=texts"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "recipe.yaml").write_text(yaml.safe_dump(as_sent(recipe)))
    settings = recipe.settings()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sent = load_recipe("recipe.yaml", [])
    assert sent.run_folder == tmp_path / "runs" / "tiny" and sent.cluster.address == "auto"
    assert sent.settings() == {**settings, "data": {**settings["data"], "source": str(tmp_path / "texts")}}


@pytest.fixture(scope="module")
def there() -> Iterator[LocalCluster]:
    """Two nodes with a place for one worker each, and a token without which nobody is let in."""
    short = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))  # unix sockets allow about 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_cluster, "folder", lambda: short / "c")
        found = local_cluster.up(nodes=2, cpus=1)
        for key, value in local_cluster.environment(found.token).items():
            patch.setenv(key, value)
        try:
            with pytest.raises(ValueError, match="a cluster is up already"):
                local_cluster.up(nodes=2, cpus=1)
            yield found
        finally:
            assert local_cluster.down() and not local_cluster.down()
        assert not (short / "c").exists() and not any(local_cluster._is_ray(pid) for pid in found.nodes)
    short.rmdir()


@pytest.fixture(scope="module")
def dashboard(there: LocalCluster) -> str:
    return there.dashboard


def test_a_submitted_job_trains_on_the_cluster(dashboard, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    done = expertmesh("submit", "tiny.yaml", "train.steps=4", "--address", dashboard, "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stderr, "the job's log was not followed"
    result = json.loads(done.stdout)
    assert result["checkpoint"] == str(tmp_path / "runs" / "tiny" / "checkpoint")
    assert (tmp_path / "runs" / "tiny" / "checkpoint" / "config.json").is_file()
    assert len(result["losses"]) == 4


def test_a_job_is_sent_once_listed_read_and_stopped(dashboard, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    words = ("submit", "tiny.yaml", "name=long", "train.steps=5000", "--id", "mine", "--address", dashboard)
    first = start_expertmesh(*words, folder=tmp_path)
    run_dir = tmp_path / "runs" / "long"
    deadline = time.monotonic() + 120
    while not (run_dir / "status.json").exists() or status_of(run_dir)["step"] < 2:
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    second = start_expertmesh(*words, folder=tmp_path)
    assert second.stdout.readline() == "job mine is there already; following it\n"
    (job,) = [job for job in list_jobs(dashboard) if job["job"] == "mine"]
    assert (job["state"], job["run_dir"]) == ("RUNNING", str(run_dir))
    shown: list[str] = []
    show_log("mine", dashboard, "trainer:1", False, shown.append)
    assert shown == [(run_dir / "logs" / "trainer-1.log").read_text()] != [""]
    stopped = expertmesh_json("stop", "mine", "--address", dashboard, folder=tmp_path)
    assert (stopped["state"], stopped["exit_code"]) == ("STOPPED", 130)
    assert (run_dir / "checkpoint" / "config.json").is_file(), "it did not save"
    for follower in (first, second):
        told, _ = follower.communicate(timeout=60)
        assert follower.returncode == 130 and "step 1/5000" in told
    with pytest.raises(ValueError, match="no job 'other' at .*; there are: .*mine"):
        find_job("other", dashboard)
    with pytest.raises(ValueError, match="job mine is over: STOPPED"):
        stop_job("mine", dashboard)


IDS = [
    (None, {}, ("tiny-X", False), "never sent"),
    (None, {"tiny-X": True}, ("tiny-X", True), "it runs"),
    (None, {"tiny-X": False}, ("tiny-X-2", False), "it ran, and may run again"),
    (None, {"tiny-X": False, "tiny-X-2": True}, ("tiny-X-2", True), "it runs again"),
    ("mine", {"mine": True}, ("mine", True), "an id that was chosen, and runs"),
    ("mine", {"mine": False}, ("mine", True), "an id that was chosen is one job for ever"),
    ("mine", {"tiny-X": True}, ("mine", False), "another id is another job"),
]


@pytest.mark.parametrize("run_id, there, expected, reason", IDS, ids=[row[-1] for row in IDS])
def test_the_same_job_has_the_same_id(run_id, there, expected, reason):
    content = {"name": "tiny", "train": {"steps": 3}}
    base, _ = choose_id(content, None, {})
    assert choose_id(dict(reversed(content.items())), None, {})[0] == base != choose_id({"name": "tiny"}, None, {})[0]
    there = {job_id.replace("tiny-X", base): running for job_id, running in there.items()}
    assert choose_id(content, run_id, there) == (expected[0].replace("tiny-X", base), expected[1])


class Gone:
    """A cluster whose head ends while a log is followed, or just after."""

    def __init__(self, tells: bool) -> None:
        self._tells = tells

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "step 1/4\n"
        if not self._tells:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_status(self, job_id: str) -> None:
        raise ConnectionError("Connection refused")


@pytest.mark.parametrize("tells", [True, False])
def test_a_followed_job_whose_cluster_is_gone(tells):
    shown: list[str] = []
    with pytest.raises(RemoteJobFailed, match="no longer tells of job mine .*goes on from the last checkpoint") as told:
        Job(Gone(tells), "mine").follow(shown.append)
    assert shown == ["step 1/4\n"] and told.value.exit_code == 1


def test_a_job_that_fails_says_why_and_keeps_its_exit_code(dashboard, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    done = expertmesh("submit", "tiny.yaml", "data.source=nowhere", "--address", dashboard, folder=tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path / 'nowhere'} does not exist" in done.stdout
    assert "ended as FAILED" in done.stderr


def test_a_job_too_large_for_the_cluster_says_what_there_is(dashboard, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    done = expertmesh(
        "submit", "tiny.yaml", "parallel.dp=64", "data.max_bytes=200000", "--address", dashboard, folder=tmp_path
    )
    assert done.returncode == 1
    assert "pool trainer asks for 64 workers of 1 CPU; the cluster has room for 2:" in done.stdout
