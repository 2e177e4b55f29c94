"""How the way to a first step is timed, with a stand-in for the command; tests/test_submit.py submits real jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import TINY_RECIPE

from expertmesh.launch.bench import first_step
from expertmesh.launch.bench.first_step import bench_first_step
from expertmesh.launch.bench.table import cluster_table
from expertmesh.launch.recipe import Recipe, load_recipe

COMMAND = """
import json, os, pathlib, sys, time
began, verb, folder = time.perf_counter(), sys.argv[2], os.environ.get("EXPERTMESH_CLUSTER", "")
with open(sys.argv[1], "a") as said:
    print(*sys.argv[2:4], os.path.basename(folder), os.environ.get("RAY_AUTH_MODE", ""), file=said)
if sys.argv[2:4] == ["cluster", "up"]:
    print(json.dumps({"dashboard": "http://d", "token": "t"}))
elif verb != "cluster":
    import yaml
    assert verb == "train" or sys.argv[4:] == ["--address", "http://d"]
    recipe = yaml.safe_load(open(sys.argv[3]))
    run = pathlib.Path(recipe["run_dir"])
    assert (run / "data" / "tokens").exists()
    if recipe["name"] in os.environ.get("FAILS", ""):
        sys.exit("no room for it")
    time.sleep(0.2)
    (run / "metrics.jsonl").write_text('{"kind": "start"}\\n{"kind": "step", "step": 1}\\n')
    time.sleep(1)
    (run / "took").write_text(str(time.perf_counter() - began))
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokens").touch()
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    (tmp_path / "command.py").write_text(COMMAND)
    said = str(tmp_path / "said")
    monkeypatch.setattr(first_step, "_COMMAND", [sys.executable, str(tmp_path / "command.py"), said])
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)

    def of(folder: Path) -> Recipe:
        return load_recipe(str(tmp_path / "tiny.yaml"), [f"run_dir={folder}", f"name={folder.name}"])

    return of


def test_the_first_step_counts_and_the_cluster_is_its_own(recipe, tmp_path):
    rows = bench_first_step(recipe, tmp_path / "tokens", tmp_path / "jobs", 1, lambda line: None)
    assert [(row["what"], row["rounds"]) for row in rows] == [("expertmesh submit", 1), ("expertmesh train", 1)]
    jobs = tmp_path / "jobs"
    took = [float((jobs / name / "took").read_text()) for name in ("submitted-0", "trained-0")]
    assert all(0.2 < row["seconds"] < whole for row, whole in zip(rows, took, strict=True)), "not to the end"
    assert (tmp_path / "said").read_text().splitlines() == [
        "cluster up c ",
        f"submit {jobs}/submitted-0/recipe.yaml  token",
        "cluster down c ",
        f"train {jobs}/trained-0/recipe.yaml  ",
    ]
    assert cluster_table(rows).row_count == 2


def test_a_job_that_fails_is_told_and_its_cluster_ended(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS", "submitted-0")
    with pytest.raises(RuntimeError, match="^expertmesh submit failed: no room for it$"):
        bench_first_step(recipe, tmp_path / "tokens", tmp_path / "jobs", 1, lambda line: None)
    assert (tmp_path / "said").read_text().splitlines()[-1] == "cluster down c "
