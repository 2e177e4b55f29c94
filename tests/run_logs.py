"""Logs of runs, made up: records as the trainer writes them, and the metrics.jsonl of a list of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expertmesh.system.train.layer_summary import LayerSummary

NAMES = ["ffn 0", "ffn 1", "ffn 2", "constant 0", "copy 0", "zero 0"]
START = {
    "kind": "start",
    "run": "quickstart",
    "world_size": 2,
    "parallel": {"tp": 1, "ep": 2, "dp": 2, "dispatch": {"kind": "all_to_all"}},
    "expert_names": NAMES,
    "unigram_loss": 6.9,
    "parameters": 3_456_789,
    "active_parameters": 1_234_567,
    "steps": 200,
}


def routers(*layers: int) -> list[dict[str, Any]]:
    return [dict.fromkeys(LayerSummary._fields, 0.125) | {"layer": layer, "copy_share": 0.456} for layer in layers]


def step(number: int, loss: float = 5.0, **changed: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "balance_loss": 0.1,
        "learning_rate": 1e-3,
        "grad_norm": 1.2,
        "tokens_per_second": 5000.0 + number,
        "load_LN": [[30, 20, 10, 20, 15, 5], [10, 10, 10, 20, 25, 25]],
        "layers": routers(0, 1),
        "ffn_experts_per_token": 1.3,
        "zero_computation_share": 0.35,
        "dispatch_bytes": 3 * 1024,
        "dispatch_bytes_saved": 1024,
        "seconds": 0.4,
    } | changed


def validation(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "validation", "step": number, "loss": loss}


def write_log(folder: Path, *records: dict[str, Any], torn: bytes = b"") -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_bytes(lines.encode() + torn)
    return folder
