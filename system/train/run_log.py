"""The log of a run: metrics.jsonl, which the report reads, and TensorBoard event files, for those who live there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from expertmesh.system.train.layer_summary import LayerSummary

SCALARS = (
    "loss",
    "balance_loss",
    "z_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "ffn_experts_per_token",
    "zero_computation_share",
    "dispatch_bytes",
    "dispatch_bytes_saved",
)

LAYER_SCALARS = tuple(name for name in LayerSummary._fields if name != "layer")


class RunLog:
    """Appends to the logs of `run_dir`. A resumed run overwrites in TensorBoard what it does again."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        path = run_dir / "metrics.jsonl"
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = open(path, "a", buffering=1)
        if torn:  # by a kill; the next record must not be lost with it
            self._file.write("\n")
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._tensorboard.close()

    def write(self, record: dict[str, Any]) -> None:
        """Log one record (see `Record` of the trainer)."""
        self._file.write(json.dumps(record) + "\n")
        if record["kind"] == "step":
            for name in SCALARS:
                self._tensorboard.add_scalar(f"train/{name}", record[name], record["step"])
            for summary in record["layers"]:
                for name in LAYER_SCALARS:
                    self._tensorboard.add_scalar(f"{name}/layer_{summary['layer']}", summary[name], record["step"])
        elif record["kind"] == "validation":
            self._tensorboard.add_scalar("validation/loss", record["loss"], record["step"])
