"""What a run has logged, read back: whole, or followed while it is written.

    run_dir/metrics.jsonl   one record a line: "start", "step", "validation", "event"
    run_dir/result.json     the final figures; not there while a run goes on

A resumed run writes some steps again: the later line wins, and what the abandoned attempt logged beyond it goes. Lines
that are no JSON object are skipped: a killed process leaves one, which a resumed one may have written on.

Shape suffixes: L layers, N experts (FFN experts first, then the zero-computation experts).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run as its files tell it; steps and validations in order, each step once, with "imbalance" for "load_LN"."""

    start: Record  # empty: nothing is logged yet
    steps: list[Record]
    load_LN: list[list[int]]  # of the last step: a long run has logged more counts than fit in memory
    layers: list[Record]  # of the last step: see `LayerSummary`
    validations: list[Record]
    events: list[Record]
    result: Record | None = None  # None: unfinished


def read_run(run_dir: Path) -> Run:
    """Read the files of a run. Raises ValueError if there is no metrics.jsonl or if no "start" record is in it."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no metrics.jsonl; give the folder of a training run")
    run = RunReader(run_dir).read()
    if not run.start:
        raise ValueError(f'{path} has no "start" record yet; wait for the first step')
    result = run_dir / "result.json"
    final = _parse(result.read_bytes()) if result.is_file() else {}
    return replace(run, result=final or None)


class RunReader:
    """Follows metrics.jsonl: each `read` takes the whole lines that were written since the one before."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._begin()

    def _begin(self) -> None:
        self._file: int | None = None  # its inode: another one is another run
        self._taken = 0  # bytes of it
        self._start: Record = {}
        self._steps: dict[int, Record] = {}
        self._load_LN: list[list[int]] = []
        self._layers: list[Record] = []
        self._validations: dict[int, Record] = {}
        self._events: list[Record] = []

    def read(self) -> Run:
        """The run as it stands now; an empty one while there is no log."""
        try:
            with self._path.open("rb") as file:
                self._follow(file.fileno())
                file.seek(self._taken)
                for line in file:
                    if not line.endswith(b"\n"):  # still being written, or torn
                        break
                    self._taken += len(line)
                    self._take(_parse(line))
        except FileNotFoundError:
            self._begin()
        steps, validations = list(self._steps.values()), list(self._validations.values())
        return Run(self._start, steps, self._load_LN, self._layers, validations, list(self._events))

    def _follow(self, file: int) -> None:
        """Begin again where the log is not the one that was read before."""
        now = os.fstat(file)
        if now.st_ino != self._file or now.st_size < self._taken:
            self._begin()
            self._file = now.st_ino

    def _take(self, record: Record) -> None:
        kind, step = record.get("kind"), record.get("step", 0)
        if kind == "start":
            self._start = record
        elif kind == "step" and self._start:
            for log in (self._steps, self._validations):
                while log and next(reversed(log)) >= step:
                    log.popitem()
            self._load_LN, self._layers = record.pop("load_LN"), record.pop("layers")
            self._steps[step] = record | {"imbalance": imbalance(self._load_LN, _ffn_experts(self._start))}
        elif kind == "validation":
            self._validations[step] = record
        elif kind == "event":
            self._events.append(record)


def imbalance(load_LN: Sequence[Sequence[int]], ffn_experts: int) -> float:
    """Return the load of the busiest FFN expert over the mean FFN expert's, in the layer where that is worst."""
    ffn_LN = [load_N[:ffn_experts] for load_N in load_LN]
    return max((max(ffn_N) * ffn_experts / sum(ffn_N) for ffn_N in ffn_LN if sum(ffn_N)), default=math.nan)


def _ffn_experts(start: Record) -> int:
    return sum(name.startswith("ffn ") for name in start["expert_names"])


def _parse(line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
