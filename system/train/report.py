"""A run should be judged at a glance: what it logged becomes one page, run_dir/report.html, without server or network.

Positions are worked out here, in units of the drawing; report.html holds the markup and the colours. The page of a run
that goes on (launch/live_page.py) is the same with more in it.
Shape suffixes: L layers, N experts (FFN experts first, then the zero-computation experts).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import jinja2

from expertmesh.system.train.read_run import Record, Run, read_run

WIDTH = 720.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 28.0, 14.0, 54.0  # margins that hold the labels, also at a phone's larger lettering
MOST_POINTS = 360  # more would be closer than two units
MOST_LABELLED_EXPERTS = 32


class Tick(NamedTuple):
    """A labelled place on an axis."""

    at: float
    label: str


class Mark(NamedTuple):
    """A place in the drawing and what it says under the pointer."""

    x: float
    y: float
    title: str


class Bucket(NamedTuple):
    """Neighbouring values of a curve, drawn as one point."""

    first: int
    last: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Plot:
    """A curve over steps, ready to be drawn: every number is a position in the drawing."""

    height: float
    right: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    path: str
    band: str  # outline of lowest to highest where a point stands for many steps
    samples: list[Mark]
    points: list[Mark]
    reference: Tick | None
    events: list[Mark]
    width: float = WIDTH
    left: float = LEFT
    top: float = TOP


class Cell(NamedTuple):
    """One expert of one layer: its share of the layer's slots in %, and how strong its colour is (0 to 1)."""

    text: str
    strength: float
    title: str
    kind: str  # "ffn" or "free"
    opens_group: bool


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what the run has logged so far; return its path.

    Raises ValueError if there is no metrics.jsonl or if no "start" record is in it.
    """
    figures = figures_of(read_run(run_dir), run_dir.resolve().name)
    page = page_templates().get_template("report.html").render(figures)
    path = run_dir / "report.html"
    unfinished = run_dir / "report.html.part"
    unfinished.write_text(page, "utf-8")
    os.replace(unfinished, path)
    return path


def page_templates(*folders: Path) -> jinja2.Environment:
    """For report.html, and for templates in `folders` that extend it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, *folders]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["human_count"] = human_count
    return environment


def figures_of(run: Run, name: str) -> dict[str, Any]:
    """Gather what the template shows; a figure nobody logged yet is None. `name`: for want of one in the log."""
    steps, start, result = run.steps, run.start, run.result or {}
    last = steps[-1] if steps else {}
    names = start.get("expert_names", [])
    rows, largest = heat_map(run.load_LN, names, [summary["layer"] for summary in run.layers])
    unigram = result.get("unigram_loss", start.get("unigram_loss"))
    happened = [event for event in run.events if event.get("what") != "saved"]
    speeds = [step["tokens_per_second"] for step in steps]

    def mean_of(figure: str) -> float | None:
        return fmean(step[figure] for step in steps) if steps else None

    return {
        "name": start.get("run", name),
        "finished": run.result is not None,
        "start": start,
        "last_step": last.get("step", 0),
        "unigram_loss": unigram,
        "validation_loss": result.get("validation_loss", run.validations[-1]["loss"] if run.validations else None),
        "tokens_per_second": result.get("tokens_per_second", median(speeds) if speeds else None),
        "ffn_experts_per_token": result.get("ffn_experts_per_token", mean_of("ffn_experts_per_token")),
        "zero_computation_share": result.get("zero_computation_share", mean_of("zero_computation_share")),
        "sent": sum(step["dispatch_bytes"] for step in steps),
        "saved": sum(step["dispatch_bytes_saved"] for step in steps),
        "kept": last.get("activation_bytes"),
        "loss": plot(
            [(step["step"], step["loss"]) for step in steps],
            height=360,
            unit="nats per token",
            points=[(validation["step"], validation["loss"]) for validation in run.validations],
            reference=unigram,
            reference_label="" if unigram is None else f"unigram {unigram:.2f}",
            events=happened,
        ),
        "not_finite": sum(not math.isfinite(step["loss"]) for step in steps),
        "imbalance": plot(
            [(step["step"], step["imbalance"]) for step in steps], height=220, unit="times the mean", reference=1.0
        ),
        "groups": expert_groups(names),
        "rows": rows,
        "largest": largest,
        "layers": run.layers,
        "most_entropy": math.log(max(len(names), 1)),
        "even": 1 / max(len(names), 1),
        "labelled": len(names) <= MOST_LABELLED_EXPERTS,
        "events": run.events,
    }


def ticks(low: float, high: float, most: int, smallest: float = 0.0) -> list[Tick]:
    """Return at most `most` + 1 round values from `low` to `high`, at least `smallest` apart, each with its label."""
    raw = max((high - low) / most, smallest)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    places = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [Tick(place * step, f"{place * step:,.{digits}f}") for place in places]


def thin(curve: Sequence[tuple[int, float]], most: int) -> list[Bucket]:
    """Gather (step, value) pairs into at most `most` buckets of equally many neighbours, the last maybe fewer."""
    size = max(1, math.ceil(len(curve) / most))
    buckets = []
    for begin in range(0, len(curve), size):
        part = curve[begin : begin + size]
        values = [value for _, value in part]
        buckets.append(Bucket(part[0][0], part[-1][0], fmean(values), min(values), max(values)))
    return buckets


def plot(
    curve: Sequence[tuple[int, float]],
    *,
    height: float,
    unit: str,
    points: Sequence[tuple[int, float]] = (),
    reference: float | None = None,
    reference_label: str = "",
    events: Sequence[Record] = (),
) -> Plot | None:
    """Lay out a curve of (step, value), single points over it and a level to compare with; None if nothing is finite.

    unit: what a value is counted in, for the words under the pointer.
    """
    finite = [(step, value) for step, value in curve if math.isfinite(value)]
    buckets = thin(finite, MOST_POINTS)
    points = [(step, value) for step, value in points if math.isfinite(value)]
    values = [end for bucket in buckets for end in (bucket.low, bucket.high)] + [value for _, value in points]
    if not values:
        return None
    if reference is not None:
        values.append(reference)
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or max(0.05 * abs(high), 0.1)
    low, high = low - pad, high + pad
    last = max([1, *(bucket.last for bucket in buckets), *(step for step, _ in points)])
    right, bottom = WIDTH - RIGHT, height - BOTTOM

    def x(step: float) -> float:
        return round(LEFT + (right - LEFT) * step / last, 2)

    def y(value: float) -> float:
        return round(bottom - (bottom - TOP) * (value - low) / (high - low), 2)

    at = [x((bucket.first + bucket.last) / 2) for bucket in buckets]
    means = list(zip(at, [y(bucket.mean) for bucket in buckets], strict=True))
    highs = list(zip(at, [y(bucket.high) for bucket in buckets], strict=True))
    lows = list(zip(at, [y(bucket.low) for bucket in buckets], strict=True))
    return Plot(
        height=height,
        right=right,
        bottom=bottom,
        x_ticks=[Tick(x(tick.at), tick.label) for tick in ticks(0, last, 5, smallest=1)],
        y_ticks=[Tick(y(tick.at), tick.label) for tick in ticks(low, high, round(height / 60))],
        path=_path(means),
        band=_path(highs + lows[::-1]) if len(buckets) < len(finite) else "",
        samples=[
            Mark(*mean, f"{_steps(bucket)}: {bucket.mean:.3f} {unit}")
            for mean, bucket in zip(means, buckets, strict=True)
        ],
        points=[Mark(x(step), y(value), f"step {step:,}, held-out: {value:.3f} {unit}") for step, value in points],
        reference=None if reference is None else Tick(y(reference), reference_label),
        events=[
            Mark(x(event["step"]), TOP, f"step {event['step']:,}: {event.get('what', 'event')}")
            for event in events
            if 0 <= event.get("step", -1) <= last
        ],
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if points else ""


def _steps(bucket: Bucket) -> str:
    if bucket.first == bucket.last:
        return f"step {bucket.first:,}"
    return f"steps {bucket.first:,} to {bucket.last:,}, mean"


def expert_groups(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return the kinds of experts and how many there are of each, in order: ffn 0, ffn 1, zero 0 -> FFN 2, zero 1."""
    kinds = [name.rsplit(" ", 1)[0] for name in names]
    return [("FFN" if kind == "ffn" else kind, len(list(group))) for kind, group in groupby(kinds)]


def heat_map(
    load_LN: Sequence[Sequence[int]], names: Sequence[str], layers: Sequence[int]
) -> tuple[list[list[Cell]], float]:
    """Return cells [L][N], and the share (0 to 1) that the strongest colour stands for. `layers`: their numbers.

    That is at least twice an even share, so that an even load shows as calm middle tones.
    """
    shares_LN = [[count / max(sum(load_N), 1) for count in load_N] for load_N in load_LN]
    largest = max([2 / max(len(names), 1), *(share for shares_N in shares_LN for share in shares_N)])
    starts = set(accumulate(size for _, size in expert_groups(names)[:-1]))
    rows = []
    for layer, load_N, shares_N in zip(layers, load_LN, shares_LN, strict=True):
        row = []
        for expert, (name, count, share) in enumerate(zip(names, load_N, shares_N, strict=True)):
            title = f"layer {layer}, {name.replace('ffn', 'FFN')}: {count:,} slots, {share:.2%}"
            kind = "ffn" if name.startswith("ffn") else "free"
            row.append(Cell(_percent(share), round(share / largest, 4), title, kind, expert in starts))
        rows.append(row)
    return rows, largest


def human_count(count: float) -> str:
    """Write a large count in words: 1_234_567 -> "1.2 million"."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:,.1f} {word}"
    return f"{count:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if 0 < share < 0.0995 else f"{100 * share:.0f}"
