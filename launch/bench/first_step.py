"""How long a user waits: from `expertmesh submit`, or `train`, to the first step of the job.

Both are run as a user runs them, and cold: the command is a new process, `train` starts a Ray of its own, and `submit`
sends the first job that its cluster has, which is up, but has neither our code nor a process to run it. Tokens are
there. The step counts once it is in the run's metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from expertmesh.launch import local_cluster
from expertmesh.launch.recipe import Recipe

_COMMAND = [sys.executable, "-m", "expertmesh.launch.cli"]
_LOOK_EVERY_S = 0.01


def bench_first_step(
    recipe: Callable[[Path], Recipe], tokens: Path, folder: Path, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each command: `what, seconds, rounds`. `recipe`: of a job in a run's folder; `tokens`: its data.

    Raises:
        RuntimeError: if a job or the cluster fails; with the last line of its log.
    """
    submitted, trained = [], []
    for number in range(rounds):
        say(f"first step: round {number + 1} of {rounds}")
        with _cluster(recipe(folder).parallel.world_size) as (dashboard, environment):
            words = ["submit", "--address", dashboard]
            submitted.append(_seconds(words, recipe(folder / f"submitted-{number}"), tokens, environment))
        trained.append(_seconds(["train"], recipe(folder / f"trained-{number}"), tokens, {}))
    seconds = {"expertmesh submit": submitted, "expertmesh train": trained}
    return [
        {"table": "first step", "what": what, "seconds": median(taken), "rounds": rounds}
        for what, taken in seconds.items()
    ]


@contextmanager
def _cluster(places: int) -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of one node, which is nobody else's: its dashboard, and what a process needs to be let in."""
    with tempfile.TemporaryDirectory(prefix="e-") as name:  # short: unix sockets allow about 107 bytes
        ours = {local_cluster.FOLDER: str(Path(name) / "c")}
        try:
            found = json.loads(_run(["cluster", "up", "--nodes", "1", "--cpus", str(places), "--json"], ours))
            yield found["dashboard"], local_cluster.environment(Path(found["token"]))
        finally:
            _run(["cluster", "down"], ours)


def _run(words: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run([*_COMMAND, *words], env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"expertmesh {words[0]} failed: {_last_line(done.stderr)}")
    return done.stdout


def _seconds(words: list[str], recipe: Recipe, tokens: Path, environment: dict[str, str]) -> float:
    """Run a job of one command to its end; returns what it took until its first step."""
    run_folder = recipe.run_folder
    shutil.copytree(tokens, run_folder / "data")
    file, log = run_folder / "recipe.yaml", run_folder / "command.log"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    began, seconds = time.perf_counter(), None
    with log.open("w") as output:
        command = subprocess.Popen(
            [*_COMMAND, words[0], str(file), *words[1:]],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        while command.poll() is None:
            if seconds is None and _has_made_a_step(run_folder):
                seconds = time.perf_counter() - began
            time.sleep(_LOOK_EVERY_S)
    finally:
        command.kill()
        command.wait()
    if command.returncode or seconds is None:
        raise RuntimeError(f"expertmesh {words[0]} failed: {_last_line(log.read_text())}")
    return seconds


def _has_made_a_step(run_folder: Path) -> bool:
    metrics = run_folder / "metrics.jsonl"
    return metrics.exists() and '"kind": "step"' in metrics.read_text()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]
