"""The small model, data and training settings that several tests share."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from expertmesh.kernels.device import Device
from expertmesh.kernels.routing import Routing, route
from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.groups import build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.attend import CausalAttend
from expertmesh.system.model.attention_config import AttentionConfig
from expertmesh.system.model.checkpoint import (
    INDEX,
    Checkpoint,
    shard_name,
    write_config,
    write_index,
    write_tensors,
)
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import Context, TrainingStep
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise, weights
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.dataset import prepare_tokens
from expertmesh.system.train.trainer import Record, Trainer

VOCAB_SIZE = 512


def tiny_model(**changes: Any) -> ModelConfig:
    """Three layers, so that gating residuals add up; 4 FFN experts and one or two of each other kind."""
    moe = MoEConfig(**{"ffn_experts": 4, "expert": {"hidden_size": 32}, **changes.pop("moe", {})})
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8)
    base: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "layers": 3, "hidden_size": 32, "context_length": 64}
    return ModelConfig(**{**base, "attention": attention, "moe": moe, **changes})


def context_of(
    sequence_length: int, sequences: int = 1, training: TrainingStep | None = None, width: float = 1.0
) -> Context:
    """What a layer is given for whole sequences on one rank."""
    positions_T = torch.arange(sequence_length).repeat(sequences)
    return Context(positions_T, CausalAttend(sequence_length), LocalDispatcher(), training, width)


def training_step(sequence_length: int, sequences: range = range(1), step: int = 1) -> TrainingStep:
    return TrainingStep(step, 10, 0, sequences, sequence_length)


def logits_before(logits_TN: torch.Tensor) -> Routing:
    """What the MoE layer before decided, as far as a gating residual reads it."""
    return route(logits_TN, 1, "paper")


def tiny_training(**changes: Any) -> TrainConfig:
    base: dict[str, Any] = {"steps": 4, "batch_size": 8, "sequence_length": 32, "warmup_steps": 2}
    often = {"validate_every": 2, "validation_batches": 2, "checkpoint_every": 2}
    return TrainConfig(**{**base, **often, **changes})


def prepare_tiny_data(run_dir: Path) -> None:
    prepare_tokens("stdlib", None, VOCAB_SIZE, 200_000, 0.1, run_dir / "data")


def train(
    run_dir: Path,
    sizes: ParallelSizes,
    model: ModelConfig,
    config: TrainConfig,
    resume_from: Path | None = None,
    begin_with: Checkpoint | None = None,
) -> list[Record]:
    """One rank of a training run over the default process group; returns its records."""
    groups = build_groups(sizes, model.moe.experts_of_layers)
    records: list[Record] = []
    settings = {"model": model.model_dump(mode="json")}
    device = Device("cpu", "gloo")
    with closing(Trainer(model, config, run_dir, groups, device, settings, resume_from, begin_with)) as trainer:
        trainer.run(records.append)
    return records


def losses(records: list[Record]) -> list[float]:
    return [record["loss"] for record in records if record["kind"] == "step"]


def write_random_checkpoint(run_dir: Path, model_config: ModelConfig) -> Path:
    """A checkpoint of random weights beside the data's tokenizer, large enough in spread to say different things."""
    model = Transformer(model_config)
    initialise(model, seed=3, standard_deviation=0.2)
    folder = run_dir / "random"
    shutil.copytree(run_dir / "data" / "tokenizer", folder)
    write_config(folder, model_config)
    tensors = {name: view for weight in weights(model) for name, view in weight.split(weight.parameter).items()}
    write_tensors(tensors, folder / shard_name("model", 0, 1))
    write_index(folder / INDEX, [folder / shard_name("model", 0, 1)])
    return folder
