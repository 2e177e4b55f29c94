"""The architecture as data: what a recipe's `model` section and a checkpoint's `config.json` hold."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from expertmesh.parallel.recipe_section import RecipeSection


class AttentionConfig(RecipeSection):
    """Grouped-query attention with rotary positions."""

    heads: int = Field(8, ge=1)
    kv_heads: int = Field(4, ge=1, description="key and value heads, each shared by heads / kv_heads query heads")
    head_dim: int = Field(32, ge=2, multiple_of=2)
    rope_theta: float = Field(10_000.0, gt=0)

    @model_validator(mode="after")
    def _groups_are_whole(self) -> AttentionConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        return self


class MoEConfig(RecipeSection):
    """One MoE layer as MoE++ has it (arXiv 2410.07348): FFN experts, and experts that cost next to nothing.

    Expert ids run over the FFN experts, then constant, copy and zero experts.
    """

    ffn_experts: int = Field(8, ge=0)
    expert_hidden_size: int = Field(512, ge=1, description="hidden width of one SwiGLU expert")
    zero_experts: int = Field(1, ge=0, description="experts that answer 0")
    copy_experts: int = Field(1, ge=0, description="experts that answer their input")
    constant_experts: int = Field(2, ge=0, description="experts that mix their input with a learned vector")
    top_k: int = Field(2, ge=1)
    gate_mode: Literal["paper", "released", "mixtral"] = "paper"
    gating_residual: bool = Field(True, description="add a learned map of the previous layer's router logits")
    tau: float = Field(0.75, gt=0, description="weight of zero-computation experts in the balance loss")
    balance_loss_weight: float = Field(0.01, ge=0)

    @property
    def zero_computation_experts(self) -> int:
        return self.constant_experts + self.copy_experts + self.zero_experts

    @property
    def num_experts(self) -> int:
        return self.ffn_experts + self.zero_computation_experts

    @property
    def expert_names(self) -> list[str]:
        """A name for each expert id, as shown in reports."""
        kinds = (
            ("ffn", self.ffn_experts),
            ("constant", self.constant_experts),
            ("copy", self.copy_experts),
            ("zero", self.zero_experts),
        )
        return [f"{kind} {i}" for kind, count in kinds for i in range(count)]

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than all {self.num_experts} experts of a layer")
        return self


class ModelConfig(RecipeSection):
    """A decoder of equal blocks: attention, then a mixture of experts."""

    vocab_size: int | None = Field(None, ge=1, description="left out of a recipe: the tokenizer decides")
    layers: int = Field(4, ge=1)
    hidden_size: int = Field(256, ge=1)
    context_length: int = Field(512, ge=1, description="longest sequence, prompt and answer together, in tokens")
    norm_eps: float = Field(1e-5, gt=0)
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()

    def num_params(self) -> int:
        """All parameters, embedding and output head included."""
        return self._params(self.moe.ffn_experts)

    def num_active_params(self) -> int:
        """Parameters a token meets when all its top_k choices are FFN experts: the upper bound of a MoE++ model."""
        return self._params(min(self.moe.top_k, self.moe.ffn_experts))

    def _params(self, ffn_experts: int) -> int:
        assert self.vocab_size is not None, "the vocabulary is not known yet"
        width, att, moe = self.hidden_size, self.attention, self.moe
        attention = width * att.head_dim * (2 * att.heads + 2 * att.kv_heads)
        router = moe.num_experts * width
        constants = moe.constant_experts * 3 * width
        experts = ffn_experts * 3 * width * moe.expert_hidden_size
        norms = 2 * width
        residual_maps = (self.layers - 1) * moe.num_experts**2 if moe.gating_residual else 0
        per_layer = attention + router + constants + experts + norms
        return self.layers * per_layer + residual_maps + 2 * self.vocab_size * width + width
