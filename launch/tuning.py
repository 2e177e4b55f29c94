"""`expertmesh kernels tune`: what is asked for, checked before anything is measured, and the table that it ends in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from expertmesh.kernels.tune import Layer, tune
from expertmesh.kernels.tuned_tiles import DTYPES, Timed, as_row, read_table, write_table


class Plan(NamedTuple):
    """What is measured, and the table that it is added to."""

    out: Path
    layers: list[Layer]
    known: list[Timed]


def check_sizes(out: Path, tokens: str, experts: int, top_k: int, hidden: int, ffn: int, dtype: str) -> Plan:
    """Raises ValueError: for sizes that are none, a table that cannot be added to, or a machine without a GPU."""
    try:
        batches = [int(number) for number in tokens.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise ValueError(f"--tokens {tokens}: give whole numbers above 0, such as 1024,16384")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: it must be one of {', '.join(DTYPES)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: it must be a file in a folder that exists")
    known = read_table(out) if out.exists() else []
    if not torch.cuda.is_available():
        raise ValueError("kernels tune measures on a GPU, and this machine has none that torch can use")
    layers = [Layer(batch, experts, top_k, hidden, ffn, getattr(torch, dtype)) for batch in batches]
    return Plan(out, layers, known)


def tune_all(plan: Plan, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure each layer in turn; the table is written after each, so that an interrupted run keeps what it has."""
    table = {timed.product: timed for timed in plan.known}
    found: list[Timed] = []
    for layer in plan.layers:
        measured = tune(layer, torch.device("cuda"), triton.testing.do_bench, say)
        found += measured
        table |= {timed.product: timed for timed in measured}
        write_table(plan.out, table.values())
    return [as_row(timed) for timed in found]
