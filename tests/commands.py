"""The `expertmesh` command as a user runs it: a process of its own, its two outputs, its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

COMMAND = [sys.executable, "-m", "expertmesh.launch.cli"]

TINY_RECIPE = """
name: tiny
model:
  layers: 2
  hidden_size: 32
  context_length: 96
  attention: {heads: 4, kv_heads: 2, head_dim: 8}
  moe: {ffn_experts: 4, expert: {hidden_size: 64}}
parallel: {dp: 2, ep: 2}
data: {max_bytes: 300_000, vocab_size: 512}
train: {steps: 30, batch_size: 64, sequence_length: 64, learning_rate: 5.0e-3, warmup_steps: 3, validate_every: 15,
        checkpoint_every: 5, validation_batches: 4}
"""


def environment() -> dict[str, str]:
    """A user's: the interpreter of this test run, and Triton as it comes."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": ""}


def expertmesh(*words: str | Path, folder: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `expertmesh WORDS` in `folder` to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, words)], cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def expertmesh_json(*words: str | Path, folder: Path, timeout: float = 240) -> dict[str, Any]:
    """Run a verb with --json; standard output must hold its result and nothing else."""
    done = expertmesh(*words, "--json", folder=folder, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def start_expertmesh(*words: str | Path, folder: Path) -> subprocess.Popen[str]:
    """Start `expertmesh WORDS` and leave it running."""
    return subprocess.Popen(
        [*COMMAND, *map(str, words)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def await_end(processes: Iterable[psutil.Process], seconds: float) -> None:
    left = list(processes)
    wait_until(lambda: all(map(_has_ended, left)), f"some have not ended: {left}", seconds)


def _has_ended(process: psutil.Process) -> bool:
    try:
        process.wait(0)
    except psutil.TimeoutExpired:
        return False
    except FileNotFoundError:  # the kernel's, of a process that ends at this very moment; psutil knows only ESRCH
        return False
    return True


def assert_same_run(run: dict[str, Any], other: dict[str, Any]) -> None:
    """Losses, and a file of weights, bit for bit."""
    assert run["losses"] == other["losses"]
    assert run["validation_loss"] == other["validation_loss"]
    mine, theirs = (Path(each["checkpoint"]) / "model-00002-of-00002.safetensors" for each in (run, other))
    assert mine.read_bytes() == theirs.read_bytes()
