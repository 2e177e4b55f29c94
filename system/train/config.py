"""What a recipe's `data` and `train` sections may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from expertmesh.parallel.recipe_section import RecipeSection

Recompute = Literal["none", "moe", "block"]


class DataConfig(RecipeSection):
    """Where text comes from and what turns it into tokens."""

    source: str = Field("stdlib", description="'stdlib' or a file, folder or glob of txt, md, py, jsonl or parquet")
    max_bytes: int | None = Field(None, ge=1, description="read no more than this many bytes of text")
    tokenizer: str | None = Field(None, description="a Hugging Face tokenizer's folder or file; none: train one")
    vocab_size: int = Field(4096, ge=300, description="of the tokenizer to be trained; a given one brings its own")
    validation_share: float = Field(0.05, gt=0, lt=1, description="share of documents held out")


class TrainConfig(RecipeSection):
    """How long, how fast, and how often to look and to save. A token counts once: batch_size is over all ranks."""

    steps: int = Field(200, ge=1)
    batch_size: int = Field(32, ge=1, description="sequences a step, over all ranks")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences computed at once, over all ranks; null: all. Balance losses are of so many"
    )
    sequence_length: int = Field(128, ge=1, description="tokens of a training sequence")
    learning_rate: float = Field(1e-3, gt=0, description="at its peak")
    min_learning_rate: float = Field(1e-4, ge=0, description="where the cosine ends")
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    gradient_clipping: float = Field(1.0, gt=0, description="largest norm of the gradient over all ranks")
    zero_stage: int = Field(
        1,
        ge=0,
        le=3,
        description="split over ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="what is computed in; bfloat16 with zero_stage=3. Masters and moments are float32"
    )
    recompute: Recompute = Field("none", description="whose activations are computed again and not kept: moe, block")
    seed: int = 0
    validate_every: int = Field(50, ge=1)
    validation_batches: int = Field(8, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    rebalance_every: int | None = Field(
        None, ge=1, description="steps after which experts may change ranks, where load says that it pays; null: never"
    )
    expert_copies: int = Field(
        0, ge=0, description="hot experts of a layer that all ranks may have copies of at once, where load says it pays"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints stay")

    @property
    def micro_batches(self) -> int:
        """Passes forward and back that make one update."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}")
        return self

    @model_validator(mode="after")
    def _rates_in_order(self) -> TrainConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}, its peak"
            )
        return self
