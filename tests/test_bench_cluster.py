"""The cluster bench kills a worker of a real job, and writes real checkpoints; here small ones, once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import environment
from typer.testing import CliRunner

from expertmesh.launch.bench import cluster
from expertmesh.launch.bench.cluster import KILL_AT, OURS, TORCH, ClusterCase, _Drill, _Enough, bench_cluster
from expertmesh.launch.bench.network import NoNetwork
from expertmesh.launch.bench.slow_link import SlowLinkCase
from expertmesh.launch.bench.table import cluster_table
from expertmesh.launch.cli import app
from expertmesh.launch.recipe import Recipe

TINY = ClusterCase(rounds=1, steps=4, layers=1, hidden_size=16, ffn_size=16, experts=2)


PROGRAM = """
import json, pathlib, sys
from expertmesh.launch.bench import cluster
folder, case = pathlib.Path(sys.argv[1]), cluster.ClusterCase(layers=1, hidden_size=16, ffn_size=16, experts=2)
if __name__ == "__main__":
    tokens = cluster._prepare(case.recipe(folder / "tokens", 1, 1))
    drill = cluster._drilled(case, tokens, folder / "job", 1)
    print(json.dumps([drill.seconds, drill.lost_steps]))
"""


def test_a_worker_of_a_real_job_is_killed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    seconds, lost = json.loads(done.stdout)
    assert 0 < seconds["noticed"] <= seconds["re-formed"] < seconds["step"] and lost >= 0
    (formed,) = [e for e in map(json.loads, (tmp_path / "job" / "events.jsonl").open()) if e["what"] == "re-formed"]
    assert formed["kept"] == [0] and formed["spares"] == [1]


def step(number: int) -> dict[str, Any]:
    return {"kind": "step", "step": number}


def test_what_is_seen_of_a_drill(tmp_path):
    """Steps of before the loss may be told after it; the first of the new epoch comes after what opens its log."""
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs" / "trainer-1.log").open("w") as log:
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=log)
    status = tmp_path / "status.json"
    drill = _Drill(tmp_path, 1)
    status.write_text(json.dumps({"spares": {"ready": 0}}))
    drill.watch(step(KILL_AT))
    assert drill.killed is None, "the spare is not ready"
    status.write_text(json.dumps({"spares": {"ready": 1}}))
    drill.watch(step(KILL_AT + 1))
    assert drill.killed and worker.wait(20) < 0
    formed = {"kind": "event", "what": "re-formed", "epoch": 1, "step": KILL_AT}
    drill.watch({"kind": "waiting", "for": "trainer 0 to notice the loss of a peer"})
    assert list(drill.seconds) == ["noticed"]
    for record in ({"kind": "event", "what": "failed"}, formed, step(KILL_AT + 2), formed):
        drill.watch(record)
    with pytest.raises(_Enough):
        drill.watch(step(KILL_AT + 1))
    assert drill.lost_steps == 2 and list(drill.seconds) == ["noticed", "re-formed", "step"]


def test_the_tables(monkeypatch):
    seconds = {"noticed": 0.1, "re-formed": 0.2, "step": 3.0}
    spares = []

    def drilled(case: ClusterCase, tokens: Path, run_folder: Path, of: int) -> _Drill:
        spares.append(of)
        return _Drill(run_folder, of, step=9, back_at=5, seconds=seconds)

    def first_step(recipe: Callable[[Path], Recipe], tokens: Path, folder: Path, *_: object) -> list[dict[str, Any]]:
        assert tokens.is_dir() and recipe(folder / "run").run_folder == folder / "run"
        return [{"table": "first step", "what": "expertmesh train", "seconds": 9.0, "rounds": 1}]

    def slow_link(case: SlowLinkCase, say: Callable[[str], None]) -> list[dict[str, Any]]:
        raise NoNetwork("an emulated network takes root")

    monkeypatch.setattr(cluster, "_drilled", drilled)
    monkeypatch.setattr(cluster, "bench_first_step", first_step)
    monkeypatch.setattr(cluster, "bench_slow_link", slow_link)
    heard: list[str] = []
    recovery, checkpoint, saving, first = tables = list(bench_cluster(TINY, heard.append))
    assert heard[-1] == "network: an emulated network takes root", "and all other tables come"
    assert first[0]["seconds"] == 9
    assert sorted(spares) == [0, 1]
    assert {row["what"]: row["step_seconds"] for row in recovery} == {"with a spare": 3.0, "without": 3.0}
    assert [row["lost_steps"] for row in recovery] == [4, 4]
    ours, theirs = checkpoint
    assert (ours["what"], theirs["what"]) == (OURS, TORCH)
    assert all(ours[f"{done}_ratio"] == 1 for done in ("write", "read", "part"))
    assert 0 < theirs["part_seconds"]
    assert theirs["write_ratio"] == pytest.approx(ours["write_seconds"] / theirs["write_seconds"])
    assert 0.5 < ours["bytes"] / theirs["bytes"] < 2, "the same state"
    without, with_saves = saving
    assert without["ratio"] == 1 and with_saves["ratio"] == pytest.approx(without["seconds"] / with_saves["seconds"])
    shown = [cluster_table(rows) for rows in tables]
    assert [table.row_count for table in shown] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    "option, why",
    [
        ("--rounds 0", "rounds=0: it must be 1 or more"),
        ("--steps 2", "steps=2: it must be 3 or more"),
        ("--hidden-size 40", "hidden_size=40: it must be a multiple of 16"),
        ("--experts 3", "experts=3: 2 workers share them"),
    ],
)
def test_sizes_that_cannot_be(option, why):
    refused = CliRunner().invoke(app, ["bench", "cluster", *option.split()])
    assert refused.exit_code == 2 and why in refused.output
