"""The small model, data and training settings that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expertmesh.kernels.device import Device
from expertmesh.parallel.groups import build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.config import AttentionConfig, ModelConfig, MoEConfig
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.dataset import prepare_tokens
from expertmesh.system.train.trainer import Record, Trainer

VOCAB_SIZE = 512


def tiny_model(**changes: Any) -> ModelConfig:
    """Three layers, so that gating residuals add up; 4 FFN experts and one or two of each other kind."""
    moe = MoEConfig(**{"ffn_experts": 4, "expert_hidden_size": 32, **changes.pop("moe", {})})
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8)
    base: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "layers": 3, "hidden_size": 32, "context_length": 64}
    return ModelConfig(**{**base, "attention": attention, "moe": moe, **changes})


def tiny_training(**changes: Any) -> TrainConfig:
    base: dict[str, Any] = {"steps": 4, "batch_size": 8, "sequence_length": 32, "warmup_steps": 2}
    often = {"validate_every": 2, "validation_batches": 2, "checkpoint_every": 2}
    return TrainConfig(**{**base, **often, **changes})


def prepare_tiny_data(run_dir: Path) -> None:
    prepare_tokens("stdlib", None, VOCAB_SIZE, 200_000, 0.1, run_dir / "data")


def train(
    run_dir: Path, sizes: ParallelSizes, model: ModelConfig, config: TrainConfig, resume_from: Path | None = None
) -> list[Record]:
    """One rank of a training run over the default process group; returns its records."""
    groups = build_groups(sizes)
    records: list[Record] = []
    settings = {"model": model.model_dump(mode="json")}
    Trainer(model, config, run_dir, groups, Device("cpu", "gloo"), settings, resume_from).run(records.append)
    return records


def losses(records: list[Record]) -> list[float]:
    return [record["loss"] for record in records if record["kind"] == "step"]
