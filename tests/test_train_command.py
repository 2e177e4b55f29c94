"""`expertmesh train` as a user meets it: what it leaves, how it is killed and resumed, and what it keeps."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import assert_same_run, expertmesh, expertmesh_json, start_expertmesh, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULT_KEYS = {
    "run_dir",
    "checkpoint",
    "steps",
    "losses",
    "validation_loss",
    "unigram_loss",
    "tokens_per_second",
    "ffn_experts_per_token",
    "zero_computation_share",
    "dispatch_bytes",
    "dispatch_bytes_saved",
    "events",
}


def processes() -> dict[int, tuple[int, str]]:
    """(parent, command line) of every living process by id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            except OSError:  # it has just ended
                continue
            if state != "Z":
                found[int(entry.name)] = (int(parent), command)
    return found


def descendants(ancestor: int) -> dict[int, str]:
    """Command lines of the processes that `ancestor` started, directly or not."""
    alive, family, grown = processes(), {ancestor}, True
    while grown:
        born = {pid for pid, (parent, _) in alive.items() if parent in family} - family
        grown = bool(born)
        family |= born
    return {pid: alive[pid][1] for pid in family - {ancestor}}


def test_training_leaves_what_it_says(folder, trained):
    assert set(trained) >= RESULT_KEYS
    run_dir, checkpoint = Path(trained["run_dir"]), Path(trained["checkpoint"])
    assert run_dir == folder / "runs" / "tiny"
    assert trained["steps"] == len(trained["losses"]) == 30
    assert trained["losses"][-1] < trained["losses"][0]
    assert 0 < trained["zero_computation_share"] < 1
    assert trained["ffn_experts_per_token"] == pytest.approx(2 * (1 - trained["zero_computation_share"]))
    assert trained["dispatch_bytes"] > 0 and trained["dispatch_bytes_saved"] > 0
    weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert {weight_map[f"layers.0.mlp.experts.{e}.down_proj.weight"] for e in (0, 3)} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert (checkpoint / "tokenizer.json").is_file() and (checkpoint / "training" / "state.json").is_file()
    assert "<svg" in (run_dir / "report.html").read_text()
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 31))


def test_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(folder, trained):
    run_dir = folder / "runs" / "killed"

    def checkpoint_written(step: int) -> Callable[[], bool]:
        return lambda: (run_dir / "checkpoints" / f"step-{step:06d}").is_dir()

    # First a worker dies, and no failure is to be survived: the command says which, and leaves nothing running.
    command = start_expertmesh("train", "tiny.yaml", "name=killed", "fault.budget=0", folder=folder)
    wait_until(checkpoint_written(5), "no checkpoint")
    (rank_0, rank_1) = sorted(pid for pid, line in descendants(command.pid).items() if "ray::TrainerRole" in line)
    family = set(descendants(command.pid))
    os.kill(rank_1, signal.SIGKILL)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == 1
    told = errors.strip().splitlines()[-1]
    assert told.startswith("expertmesh: trainer ") and "died" in told and "goes on from the last checkpoint" in told
    wait_until(lambda: not family & set(processes()), "workers outlive the command", 30)

    # Then the command itself dies, without a chance to put anything away.
    command = start_expertmesh("train", "tiny.yaml", "name=killed", folder=folder)
    wait_until(checkpoint_written(15), "no second checkpoint")
    family = {pid for pid, line in descendants(command.pid).items() if "ray::TrainerRole" in line}
    command.kill()
    command.communicate()
    wait_until(lambda: not family & set(processes()), "workers outlive the killed command", 30)

    # However far its workers came, the same command ends where the run that was never disturbed did.
    assert_same_run(expertmesh_json("train", "tiny.yaml", "name=killed", folder=folder), trained)


def test_plain_processes_train_the_same(folder, trained):
    assert_same_run(
        expertmesh_json("train", "tiny.yaml", "name=plain", "cluster.launcher=processes", folder=folder), trained
    )


def test_a_finished_run_is_kept_aside_when_the_same_is_trained_again(folder, trained):
    copy = folder / "runs" / "again"
    shutil.copytree(trained["run_dir"], copy, symlinks=True)
    done = expertmesh("train", "tiny.yaml", "name=again", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "is kept as" in done.stdout
    (aside,) = (folder / "runs").glob("again-before-*")
    assert (aside / "checkpoint" / "config.json").is_file()
    assert (copy / "checkpoint" / "config.json").is_file()
