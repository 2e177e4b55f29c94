"""Ranks that torchrun started, or Slurm as far as its variables go: a job ends with one of them, and goes on when all
are started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import COMMAND, environment, expertmesh_json, wait_until

from expertmesh.system.train.snapshot import read_state

SHORT = ("train.steps=40", "train.checkpoint_every=4", "train.validate_every=40")
TRAIN = ("train", "tiny.yaml", *SHORT, "name=started", "cluster.launcher=environment", "--json")


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    return expertmesh_json("train", "tiny.yaml", *SHORT, "cluster.launcher=processes", folder=folder)


def a_free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(command: list[str], folder: Path, **variables: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    told = {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(command, cwd=folder, env=environment() | told, **pipes)


def srun(folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    """Two ranks as Slurm would start them on this host."""
    job = {"SLURM_NTASKS": 2, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "localhost"}
    port = a_free_port()
    ranks = [job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port} for rank in range(2)]
    return [start([*COMMAND, *TRAIN, *words], folder, **rank) for rank in ranks]


def ends(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Of each: exit code, standard output, and the last line of the other that is ours: libraries may say more."""
    told = [rank.communicate(timeout=120) for rank in ranks]
    return [
        (rank.returncode, out, ([line for line in errors.splitlines() if line.startswith("expertmesh: ")] or [""])[-1])
        for rank, (out, errors) in zip(ranks, told, strict=True)
    ]


def saved(run_dir: Path) -> int:
    return read_state(run_dir / "checkpoint").step if (run_dir / "checkpoint").exists() else 0


def test_a_job_that_is_started_again_and_again_is_the_same_bit_for_bit(folder, trained):
    run_dir = folder / "runs" / "started"
    log = run_dir / "metrics.jsonl"

    # Both are told to end, as Slurm does before it takes the nodes: they save where they are.
    ranks = srun(folder)
    wait_until(lambda: log.exists() and '"kind": "step"' in log.read_text(), "no step")
    for rank in ranks:
        rank.terminate()
    assert ends(ranks) == [(130, "", "expertmesh: interrupted")] * 2
    interrupted = saved(run_dir)
    assert 0 < interrupted < 40

    # torchrun starts them, and all of them anew when one is lost; only rank 0 prints.
    words = ["--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(a_free_port()), "--no-python"]
    torchrun = start([sys.executable, "-m", "torch.distributed.run", *words, *COMMAND, *TRAIN], folder)
    wait_until(lambda: saved(run_dir) > interrupted, "no checkpoint of torchrun's")
    second = [each for each in psutil.Process(torchrun.pid).children() if each.environ().get("RANK") == "1"]
    os.kill(second[0].pid, signal.SIGKILL)
    ((code, out, _),) = ends([torchrun])
    assert code == 0
    result = json.loads(out)
    assert [event["what"] for event in result["events"]].count("resumed") == 2, "a checkpoint was not gone on from"
    assert result["losses"] == trained["losses"] and result["validation_loss"] == trained["validation_loss"]
    mine, theirs = (Path(each["checkpoint"]) / "model-00002-of-00002.safetensors" for each in (result, trained))
    assert mine.read_bytes() == theirs.read_bytes()
    logs = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert logs == ["trainer-0.log", "trainer-1.log"]


def test_another_size_is_refused_by_each_rank(folder):
    refused = (2, "", "expertmesh: SLURM_NTASKS=2: the recipe's parallel section makes 4 workers; start as many, or ")
    for code, out, told in ends(srun(folder, "parallel.dp=4", "name=four")):
        assert (code, out, told[: len(refused[2])]) == refused
    assert not (folder / "runs" / "four").exists()


def test_what_rank_0_refuses_ends_the_others(folder):
    (code, _, told), (other, out, why) = ends(srun(folder, "data.source=/no/such/place", "name=refused"))
    assert code == 2 and "/no/such/place does not exist" in told
    assert (other, out) == (1, "") and why == "expertmesh: trainer 0 is gone, and with it the job; what it said is why"
