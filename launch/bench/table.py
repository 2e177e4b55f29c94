"""The rows of one size and pass as a table for a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

COLUMNS = ("", "ms a call", "thousand tokens/s", "of grouped limit", "of dense limit", "beside ours")


def table(rows: list[dict[str, Any]]) -> Table:
    """Ratios are speeds: 0.8 of the limit, 2 times ours. What was not timed says why in place of them."""
    first = rows[0]
    sizes = f"{first['tokens']} tokens, {first['experts']} experts, top-{first['top_k']}"
    shown = Table(title=f"{first['pass']}, {first['dtype']}, {sizes}", title_justify="left", caption_justify="left")
    with_traffic = "dispatched_bytes" in first
    columns = (*COLUMNS[:3], "beside vanilla", "to FFN experts", "MB sent") if with_traffic else COLUMNS
    for number, name in enumerate(columns):
        shown.add_column(name, justify="right" if number else "left", overflow="fold")
    notes = []
    for row in rows:
        mark = ""
        if row["note"]:
            notes.append(f"{row['what']}: {row['note']}")
            mark = " *" if row["seconds"] else ""
        if row["seconds"] is None:
            continue
        cells = [row["what"] + mark, f"{row['seconds'] * 1e3:.3g}", f"{row['tokens_per_second'] / 1e3:.3g}"]
        if with_traffic:
            cells += [_ratio(row["ratio_to_ours"]), f"{row['ffn_share']:.0%}", f"{row['dispatched_bytes'] / 1e6:.2f}"]
        else:
            cells += [_ratio(row[key]) for key in ("ratio_to_limit", "ratio_to_dense_limit", "ratio_to_ours")]
        shown.add_row(*cells)
    if notes:
        shown.caption = "\n".join(notes)
    return shown


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
