"""What a person sees while a job trains: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
BARS = " ▁▂▃▄▅▆▇█"


def sparkline(load_LN: list[list[int]]) -> str:
    """Load per expert, summed over layers, as one character each; the tallest is the busiest expert."""
    load_N = [sum(layer) for layer in zip(*load_LN, strict=True)]
    top = max(load_N) or 1
    return "".join(BARS[round(load / top * (len(BARS) - 1))] for load in load_N)


class TrainingProgress:
    """Shows a run's records (see `Record` of the trainer) on `console` as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("waiting", total=None, figures="")
        self._total = 0
        self._ffn_experts = 0
        self._shown = 0.0

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "waiting":
            self._bar.update(self._task, description=f"waiting for {record['for']}")
            if not self._live:
                self._console.print(f"waiting for {record['for']}", highlight=False)
        elif kind == "start":
            self._start(record)
        elif kind == "step":
            self._step(record)
        elif kind == "validation":
            self._say(f"step {record['step']}: held-out loss {record['loss']:.3f}")
        elif kind == "event" and record["what"] == "resumed":
            self._bar.update(self._task, completed=record["step"])

    def _start(self, record: dict[str, Any]) -> None:
        self._total = record["steps"]
        names = record["expert_names"]
        self._ffn_experts = sum(name.startswith("ffn") for name in names)
        sizes = ", ".join(f"{name} {size}" for name, size in record["parallel"].items())
        self._say(
            f"{record['parameters'] / 1e6:.1f} M parameters, {record['active_parameters'] / 1e6:.1f} M active; "
            f"{self._ffn_experts} FFN + {len(names) - self._ffn_experts} zero-computation experts a layer; "
            f"{record['world_size']} workers ({sizes}); {record['train_tokens'] / 1e6:.2f} M tokens; "
            f"unigram loss {record['unigram_loss']:.3f}"
        )
        self._bar.update(self._task, description="training", total=self._total)

    def _step(self, record: dict[str, Any]) -> None:
        load = sparkline(record["load_LN"])
        figures = (
            f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"load {load[: self._ffn_experts]}|{load[self._ffn_experts :]}  "
            f"zero-computation {record['zero_computation_share']:.0%}"
        )
        self._bar.update(self._task, completed=record["step"], figures=figures)
        due = time.monotonic() - self._shown >= LINE_EVERY_S
        if not self._live and (due or record["step"] in (1, self._total)):
            self._shown = time.monotonic()
            self._say(f"step {record['step']}/{self._total}  {figures}")

    def _say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, soft_wrap=True)
        sys.stdout.flush()
