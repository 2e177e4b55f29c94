"""What a person sees while a job trains: a live bar and figures on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_EVERY_S = 10.0
BARS = " ▁▂▃▄▅▆▇█"


def sparkline(load_LN: list[list[int]]) -> str:
    """Load per expert, summed over layers, as one character each; the tallest is the busiest expert."""
    load_N = [sum(layer) for layer in zip(*load_LN, strict=True)]
    top = max(load_N, default=0) or 1  # a dense model has no layer with experts
    return "".join(BARS[round(load / top * (len(BARS) - 1))] for load in load_N)


def _routing(layers: list[dict[str, Any]]) -> str:
    """What may be wrong with the routing, in a few words: the worst layer counts."""
    if not layers:
        return ""
    words = f"busiest expert {max(layer['load_max_over_mean'] for layer in layers):.1f}x"
    dropped = max(layer["dropped_share"] for layer in layers)
    return f"{words}   dropped {dropped:.1%}" if dropped else words


class TrainingProgress:
    """Shows a run's records (see `Record` of the trainer) on `console` as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(), *columns, console=console)
        self._figures = Text()
        self._live = Live(Group(self._bar, self._figures), console=console) if console.is_terminal else None
        self._task = self._bar.add_task("starting", total=None)
        self._steps = 0
        self._ffn_experts = 0
        self._printed = float("-inf")

    def __enter__(self) -> TrainingProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "waiting":
            self._bar.update(self._task, description=f"waiting for {record['for']}")
            if not self._live:
                self._print(f"waiting for {record['for']}")
        elif kind == "start":
            self._start(record)
        elif kind == "step":
            self._step(record)
        elif kind == "validation":
            self._print(f"step {record['step']}: held-out loss {record['loss']:.3f}")
        elif kind == "event":
            self._event(record)

    def _event(self, record: dict[str, Any]) -> None:
        if "step" in record and record["what"] in ("resumed", "re-formed"):
            self._bar.update(self._task, completed=record["step"])
        if "epoch" in record:  # the coordinator's: something happened to the job
            step, why = record.get("step"), record.get("why")
            place = f" at step {step}" if step is not None else ""
            self._print(f"{record['what']}{place}{f': {why}' if why else ''}")

    def _start(self, record: dict[str, Any]) -> None:
        names = record["expert_names"]
        self._steps, self._ffn_experts = record["steps"], sum(name.startswith("ffn") for name in names)
        sizes = ", ".join(f"{name} {size}" for name, size in record["parallel"].items())
        self._print(
            f"{record['parameters'] / 1e6:.1f} M parameters, {record['active_parameters'] / 1e6:.1f} M active; "
            f"{self._ffn_experts} FFN + {len(names) - self._ffn_experts} zero-computation experts a layer; "
            f"{record['world_size']} workers ({sizes}); {record['train_tokens'] / 1e6:.2f} M tokens; "
            f"unigram loss {record['unigram_loss']:.3f}"
        )
        self._bar.update(self._task, description="training", total=self._steps)

    def _step(self, record: dict[str, Any]) -> None:
        load = sparkline(record["load_LN"])
        figures = (
            f"loss {record['loss']:.3f}   {record['tokens_per_second']:,.0f} tokens/s   "
            f"load {load[: self._ffn_experts]}|{load[self._ffn_experts :]}   "
            f"to zero-computation experts {record['zero_computation_share']:.0%}   {_routing(record['layers'])}"
        )
        self._bar.update(self._task, completed=record["step"], description="training")
        self._figures.plain = figures
        due = time.monotonic() - self._printed >= LINE_EVERY_S or record["step"] in (1, self._steps)
        if not self._live and due:
            self._printed = time.monotonic()
            self._print(f"step {record['step']}/{self._steps}   {figures}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)  # errors have brackets
