"""`expertmesh plan train` tells a layout, or refuses it in one line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from expertmesh.launch.cli import app

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PIPELINE = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "train.micro_batch_size=4"]


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", "train", "quickstart", *words])
    return result.exit_code, result.stdout, result.stderr


def test_json():
    code, out, _ = run(*PIPELINE, "--rank", "3", "--check", "--json")
    result = json.loads(out)
    assert code == 0 and result["world_size"] == 4
    assert result["groups"]["pipeline"] == [1, 3] and result["groups"]["expert"] == [2, 3]
    assert [stage["layers"] for stage in result["stages"]] == [[[0, 2]], [[2, 4]]]
    for stage in result["stages"]:
        parts = [stage[f"{what}_bytes"] for what in ("weight", "gradient", "optimizer", "activation")]
        assert stage["memory_bytes"] == sum(parts) and min(parts) > 0
    assert result["check"]["ranks"] == [0, 1, 2, 3] and min(result["check"]["calls"].values()) > 0


def test_groups_of_a_pyramid():
    words = ["parallel.dp=4", "parallel.ep=4", "model.moe.ffn_experts=[4,6,8,1]", "model.moe.gating_residual=false"]
    code, out, err = run(*words, "train.batch_size=8", "--rank", "3", "--check", "--json")
    assert code == 0, err
    groups = json.loads(out)["groups"]
    assert groups["expert"] == [0, 1, 2, 3] and "expert_data" not in groups
    assert (groups["expert, 6 experts"], groups["expert_data, 6 experts"]) == ([2, 3], [1, 3])
    assert (groups["expert, 1 experts"], groups["expert_data, 1 experts"]) == ([3], [0, 1, 2, 3])


def test_lines():
    code, out, _ = run(*PIPELINE, "--check")
    assert code == 0 and "4 ranks rehearsed" in out and "rank 0 pipeline: [0, 2]" in out
    without = run(*PIPELINE)[1]
    assert "rehearsed" not in without and " ? " in without and " ? " not in out


WRONG = [
    (["--rank", "2"], "--rank 2: the recipe has ranks 0 to 1", "a rank that is not there"),
    (["parallel.ep=3"], "ep=3 does not divide dp=2", "a layout that does not fit"),
    (
        ["--check", "parallel.dp=8192", "parallel.ep=1", "train.batch_size=8192"],
        "--check: 8192 ranks are more than the 4096 that can be rehearsed",
        "more than can be rehearsed",
    ),
    (
        ["parallel.tp=2", "parallel.dp=1", "parallel.ep=1", "data.vocab_size=1001"],
        "model.vocab_size=1001: parallel.tp=2 does not divide it",
        "a vocabulary that is known from the data alone",
    ),
]


@pytest.mark.parametrize("words, line, reason", WRONG, ids=[reason for *_, reason in WRONG])
def test_wrong_input(words, line, reason):
    code, out, err = run(*words)
    assert code == 2 and line in err and len(err.splitlines()) == 1 and not out
