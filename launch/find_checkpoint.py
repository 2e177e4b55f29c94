"""From a path that a user gave to a checkpoint: a run's, ours, or Hugging Face's as it was downloaded."""

from __future__ import annotations

from pathlib import Path

from expertmesh.system.convert.huggingface import open_hf
from expertmesh.system.model.checkpoint import Checkpoint, open_checkpoint, read_json


def checkpoint_folder(path: Path) -> Path:
    """The folder of a checkpoint that was named itself or by its run. Raises ValueError."""
    folder = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    if not folder.is_dir():
        raise ValueError(f"no checkpoint folder {path}; training writes one as RUN_DIR/checkpoint")
    return folder


def find_checkpoint(path: Path) -> Checkpoint:
    """Look at the checkpoint that `path` leads to; its weights are not read yet. Raises ValueError with one line."""
    folder = checkpoint_folder(path).resolve()
    ours = read_json(folder / "config.json").get("model_type") == "expertmesh"
    return open_checkpoint(folder) if ours else open_hf(folder)
