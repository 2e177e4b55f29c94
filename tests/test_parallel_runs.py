"""Whole runs of every layout train what one rank trains, and any goes on from what any other has saved."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ranks import run_ranks
from tiny import losses, prepare_tiny_data, tiny_model, tiny_training, train

from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.train.snapshot import checkpoints_of


class Layout(NamedTuple):
    sizes: dict[str, int]
    zero_stage: int
    reason: str
    alone: int = 0  # the row of the same model on one rank


RUNS = [
    Layout({}, 1, "one rank"),
    Layout({"tp": 2, "ep": 2}, 1, "tensor and expert parallel"),
    Layout({"dp": 2, "etp": 2}, 2, "data and expert tensor parallel, ZeRO 2"),
    Layout({"tp": 2, "cp": 2, "ep": 2, "etp": 2}, 2, "tensors, sequences and experts both ways, ZeRO 2"),
    Layout({"pp": 2, "dp": 2, "ep": 2}, 2, "a pipeline of two, each stage's experts on two ranks, ZeRO 2"),
    Layout({"pp": 2, "tp": 2, "ep": 2}, 0, "a pipeline of two tensor groups, ZeRO 0"),
    Layout({"dp": 4, "ep": 2}, 3, "data and expert parallel, fully sharded"),
    Layout({"tp": 2, "dp": 2, "ep": 2}, 3, "tensor, data and expert parallel, fully sharded"),
    Layout({}, 1, "a pyramid on one rank", 8),
    Layout({"dp": 4, "ep": 4}, 2, "a pyramid's layers on four ranks, two and one, ZeRO 2", 8),
    Layout({"pp": 2, "dp": 2, "ep": 2}, 0, "a pyramid on two stages, ZeRO 0", 8),
    Layout({"tp": 2, "dp": 2, "ep": 4}, 3, "a pyramid on tensor ranks, fully sharded", 8),
]
# Who writes a checkpoint, who reads it.
PAIRS = [*itertools.permutations(range(4), 2), (0, 4), (4, 0), (3, 4), (4, 3)]
PAIRS += [(5, 3), (3, 5), (6, 4), (5, 6), (6, 0), (0, 6), (7, 4), (4, 7)]
PAIRS += [(8, 9), (9, 10), (10, 11), (11, 9), (9, 8)]
STEPS, HALF = 20, 10
# Float32 sums in another order: about 1e-7 a step, growing with the steps.
SAME_LOSS, SAME_NORM = 3e-6, 3e-5


def run_model(pyramid: bool) -> ModelConfig:
    """Something of each kind: whole and split weights, biases that no gradient moves, dropped slots."""
    moe = {"gate_mode": "sigmoid", "selection_bias": True, "capacity": {"factor": 1.0}, "shared": {"hidden_size": 24}}
    if pyramid:
        return tiny_model(layers=3, moe=moe | {"ffn_experts": [4, 6, 3], "gating_residual": False})
    return tiny_model(layers=2, moe=moe, tie_embeddings=True)


class Job(NamedTuple):
    """A run in `run_dir`; the sizes and ZeRO stage are those of a row of RUNS."""

    run_dir: Path
    row: int
    resume_from: Path | None = None


class Result(NamedTuple):
    losses: list[float]
    norms: list[float]


def run_job(job: Job) -> Result:
    """On one rank."""
    sizes, stage, _, alone = RUNS[job.row]
    often = {"validate_every": STEPS, "checkpoint_every": HALF, "keep_checkpoints": 3}
    config = tiny_training(steps=STEPS, micro_batch_size=4, zero_stage=stage, gradient_clipping=0.5, **often)
    records = train(job.run_dir, ParallelSizes(**sizes), run_model(alone > 0), config, job.resume_from)
    return Result(losses(records), [record["grad_norm"] for record in records if record["kind"] == "step"])


def run_all(jobs: list[Job]) -> dict[Job, Result]:
    """What rank 0 tells of each; its ranks are new ones, for what DeepSpeed and FSDP keep keeps groups."""
    return {job: run_ranks(run_job, ParallelSizes(**RUNS[job.row].sizes).world_size, job)[0] for job in jobs}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    prepare_tiny_data(folder)
    return folder / "data"


def new_run(data: Path, run_dir: Path) -> Path:
    shutil.copytree(data, run_dir / "data")
    return run_dir


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Result]]:
    """The whole run of each row, and where its checkpoints are."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [Job(new_run(data, folder / str(row)), row) for row in range(len(RUNS))]
    results = run_all(jobs)
    return [(job.run_dir, results[job]) for job in jobs]


SPREAD = [row for row, layout in enumerate(RUNS) if layout.alone != row]


@pytest.mark.parametrize("row", SPREAD, ids=[RUNS[row].reason for row in SPREAD])
def test_a_run_has_the_losses_and_norms_of_one_rank(runs, row):
    (_, alone), (_, spread) = runs[RUNS[row].alone], runs[row]
    assert len(alone.losses) == STEPS
    assert max(alone.norms) > 0.5, "clipping is not active"
    assert spread.losses == pytest.approx(alone.losses, rel=SAME_LOSS)
    assert spread.norms == pytest.approx(alone.norms, rel=SAME_NORM)


@pytest.fixture(scope="module")
def resumed(data: Path, runs: list[tuple[Path, Result]], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Result]:
    """By (who wrote, who read): the second half of a run, from the checkpoint that another layout wrote."""
    folder = tmp_path_factory.mktemp("resumed")
    jobs = {}
    for writer, reader in PAIRS:
        halfway = checkpoints_of(runs[writer][0])[0]
        jobs[writer, reader] = Job(new_run(data, folder / f"{writer}-{reader}"), reader, halfway)
    results = run_all(list(jobs.values()))
    return {pair: results[job] for pair, job in jobs.items()}


@pytest.mark.parametrize("writer, reader", PAIRS, ids=[f"{RUNS[w].reason} -> {RUNS[r].reason}" for w, r in PAIRS])
def test_any_layout_goes_on_from_what_any_other_saved(runs, resumed, writer, reader):
    whole, second_half = runs[writer][1], resumed[writer, reader]
    assert second_half.losses == pytest.approx(whole.losses[HALF:], rel=SAME_LOSS)
    assert second_half.norms == pytest.approx(whole.norms[HALF:], rel=SAME_NORM)
