"""The rows of one bench and size as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table

PARALLEL_COLUMNS = (("seconds", 1e3), ("ratio_to_ours", 1), ("sent_bytes", 1e-6), ("bytes_to_ours", 1))
MEMORY_COLUMNS = {
    "weights": "weight_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
    "all, as planned": "planned_bytes",
    "measured": "most_bytes",
}
COLUMNS = ("", "ms", "tokens/s", "of limit", "of dense", "of ours")


def table(rows: list[dict[str, Any]]) -> Table:
    """Ratios are speeds: 0.8 of the grouped limit or of the dense one, 2 times ours or our vanilla layer's.

    What was not timed says why below the table.
    """
    first = rows[0]
    sizes = f"{first['tokens']} tokens, {first['experts']} experts, top-{first['top_k']}, threads: {first['threads']}"
    title = f"{first['pass']}, {first['dtype']}, {sizes}"
    with_traffic = "dispatched_bytes" in first
    shown = _empty(title, (*COLUMNS[:3], "of vanilla", "to FFN", "MB sent") if with_traffic else COLUMNS)
    notes = []
    for row in rows:
        mark = ""
        if row["note"]:
            notes.append(f"{row['what']}: {row['note']}")
            mark = " *" if row["seconds"] else ""
        if row["seconds"] is None:
            continue
        milliseconds = row["seconds"] * 1e3
        cells = [row["what"] + mark, f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"]
        cells.append(f"{row['tokens_per_second']:,.0f}")
        if with_traffic:
            cells += [_ratio(row["ratio_to_ours"]), f"{row['ffn_share']:.0%}", f"{row['dispatched_bytes'] / 1e6:.2f}"]
        else:
            cells += [_ratio(row[key]) for key in ("ratio_to_limit", "ratio_to_dense_limit", "ratio_to_ours")]
        shown.add_row(*cells)
    if notes:
        shown.caption = "\n".join(notes)
    return shown


def _empty(title: str, columns: Iterable[str]) -> Table:
    shown = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        shown.add_column(name, justify="right" if number else "left", no_wrap=True)
    return shown


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def parallel_table(rows: list[dict[str, Any]]) -> Table:
    """Speed and bytes are beside ours: 0.5 takes twice as long, or sends half. What was not timed says why below."""
    first = rows[0]
    if first["table"] == "memory":
        return _memory_table(rows)
    sizes = f"{first['tokens']} tokens a rank, {first['experts']} experts, top-{first['top_k']}, {first['dtype']}"
    title = f"{first['ranks']} ranks, {sizes}, threads of a rank: {first['threads']}"
    shown = _empty(title, ("", "ms", "speed", "MB sent", "bytes"))
    for row in rows:
        if row["sent_bytes"] is not None:
            cells = [
                row["what"],
                *("" if row[key] is None else f"{row[key] * factor:.3g}" for key, factor in PARALLEL_COLUMNS),
            ]
            shown.add_row(*cells)
    shown.caption = "\n".join(f"{row['what']}: {row['note']}" for row in rows if row["note"])
    return shown


def _memory_table(rows: list[dict[str, Any]]) -> Table:
    title = f"memory of one of {rows[0]['ranks']} ranks, {rows[0]['parameters'] / 1e6:.1f} M parameters: MB"
    shown = _empty(title, ("", *MEMORY_COLUMNS))
    for row in rows:
        shown.add_row(row["what"], *(f"{row[key] / 1e6:.4g}" for key in MEMORY_COLUMNS.values()))
    return shown


def serve_table(rows: list[dict[str, Any]]) -> Table:
    """Speed is beside our joined engine. What was not timed says why below."""
    first = rows[0]
    sizes = f"{first['prompt_tokens']} tokens of prompt and {first['new_tokens']} new ones each, {first['dtype']}"
    title = f"{first['concurrent']} requests at once, {sizes}"
    shown = _empty(title, ("", "tokens/s", "speed", "same tokens"))
    for row in rows:
        if row["seconds"] is not None:
            speed = f"{row['tokens_per_second']:,.0f}"
            shown.add_row(row["what"], speed, _ratio(row["ratio_to_ours"]), f"{row['same_tokens']:.0%}")
    shown.caption = "\n".join(f"{row['what']}: {row['note']}" for row in rows if row["note"])
    return shown


CLUSTER_TABLES: dict[str, tuple[str, tuple[tuple[str, str, float], ...]]] = {
    "recovery": (
        "a worker is killed: seconds until",
        (
            ("noticed", "noticed_seconds", 1),
            ("re-formed", "reformed_seconds", 1),
            ("first step", "step_seconds", 1),
            ("steps lost", "lost_steps", 1),
        ),
    ),
    "checkpoint": (
        "a checkpoint, on one rank",
        (
            ("MB", "bytes", 1e-6),
            ("write, ms", "write_seconds", 1e3),
            ("speed", "write_ratio", 1),
            ("read, ms", "read_seconds", 1e3),
            ("speed", "read_ratio", 1),
            ("a part, ms", "part_seconds", 1e3),
            ("speed", "part_ratio", 1),
        ),
    ),
    "saving": ("a step, on one rank", (("ms", "seconds", 1e3), ("speed", "ratio", 1))),
    "network": (
        "a step of one layer over a slow link",
        (
            ("ms", "seconds", 1e3),
            ("speed", "ratio", 1),
            ("MB, slow link", "slow_bytes", 1e-6),
            ("MB, the others", "fast_bytes", 1e-6),
            ("MB of rows", "row_bytes", 1e-6),
        ),
    ),
    "first step": ("from the command to the first step: seconds", (("first step", "seconds", 1),)),
}


def cluster_table(rows: list[dict[str, Any]]) -> Table:
    """Speeds are beside the first row's: 0.5 takes twice as long. MB of rows: as the dispatchers count them."""
    title, columns = CLUSTER_TABLES[rows[0]["table"]]
    rounds = f"median of {rows[0]['rounds']}"
    shown = _empty(f"{title}, {rounds}", ("", *(name for name, _, _ in columns)))
    for row in rows:
        shown.add_row(row["what"], *(f"{row[key] * factor:.3g}" for _, key, factor in columns))
    shown.caption = rows[0].get("note")
    return shown
