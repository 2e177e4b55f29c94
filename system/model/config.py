"""The architecture as data: what a recipe's `model` section and a checkpoint's `config.json` hold.

A model is one block repeated. What varies between architectures is which part stands in which place of it:

    attention    `AttentionConfig` (grouped queries) or `MLAConfig` (latent keys and values)
    feed-forward `MoEConfig`: routed, zero-computation and shared experts; or, in `dense_layers`, one dense SwiGLU
    router       part of `MoEConfig`: a gate mode, groups, a selection bias, a gating residual
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from expertmesh.parallel.recipe_section import RecipeSection


def _query_params(hidden_size: int, width: int, rank: int | None) -> int:
    """Of the map to queries: one matrix, or two with a norm between them."""
    return hidden_size * width if rank is None else rank * (hidden_size + 1 + width)


class AttentionConfig(RecipeSection):
    """Grouped-query attention with rotary positions.

    With `query_rank` and one key-value head it is multi-matrix factorization attention (Step-3, arXiv 2412.19255).
    """

    kind: Literal["gqa"] = "gqa"
    heads: int = Field(8, ge=1)
    kv_heads: int = Field(4, ge=1, description="key and value heads, each shared by heads / kv_heads query heads")
    head_dim: int = Field(32, ge=2, multiple_of=2)
    rope_theta: float = Field(10_000.0, gt=0)
    query_rank: int | None = Field(None, ge=1, description="width of a vector that the queries are made from")
    qk_norm: Literal["none", "head", "width"] = Field("none", description="RMSNorm of queries and keys, over what")
    qkv_bias: bool = False
    output_bias: bool = False
    sliding_window: int | None = Field(None, ge=1, description="how many tokens back, itself included, a token sees")

    @property
    def key_shape(self) -> tuple[int, int]:
        """(heads, width) of the keys that a cache holds for one token."""
        return self.kv_heads, self.head_dim

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.kv_heads, self.head_dim

    def num_params(self, hidden_size: int) -> int:
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms = {"none": 0, "head": 2 * self.head_dim, "width": query + kv}[self.qk_norm]
        biases = self.qkv_bias * (query + 2 * kv) + self.output_bias * hidden_size
        made = _query_params(hidden_size, query, self.query_rank)
        return made + hidden_size * (query + 2 * kv) + norms + biases

    @model_validator(mode="after")
    def _groups_are_whole(self) -> AttentionConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        return self


class MLAConfig(RecipeSection):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): narrow vectors make keys and values."""

    kind: Literal["mla"]
    heads: int = Field(ge=1)
    query_rank: int | None = Field(None, ge=1, description="width of the queries' latent vector; null: none")
    kv_rank: int = Field(ge=1, description="width of the latent vector of keys and values")
    nope_head_dim: int = Field(ge=1, description="width of a head without position")
    rope_head_dim: int = Field(ge=2, multiple_of=2, description="width of a head's part with rotary position")
    value_head_dim: int = Field(ge=1)
    rope_theta: float = Field(10_000.0, gt=0)

    @property
    def key_shape(self) -> tuple[int, int]:
        """(heads, width) of the keys that a cache holds for one token."""
        return self.heads, self.nope_head_dim + self.rope_head_dim

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.heads, self.value_head_dim

    def num_params(self, hidden_size: int) -> int:
        width = self.heads * (self.nope_head_dim + self.rope_head_dim)
        queries = _query_params(hidden_size, width, self.query_rank)
        latent = hidden_size * (self.kv_rank + self.rope_head_dim) + self.kv_rank
        expand = self.kv_rank * self.heads * (self.nope_head_dim + self.value_head_dim)
        return queries + latent + expand + self.heads * self.value_head_dim * hidden_size


ATTENTION_KINDS: dict[str, type[RecipeSection]] = {"gqa": AttentionConfig, "mla": MLAConfig}


def _attention_kind(value: Any) -> str:
    return value.get("kind", "gqa") if isinstance(value, dict) else getattr(value, "kind", "gqa")


AnyAttention = Annotated[
    Annotated[AttentionConfig, Tag("gqa")] | Annotated[MLAConfig, Tag("mla")],
    Discriminator(_attention_kind, custom_error_type="kind", custom_error_message="kind must be 'gqa' or 'mla'"),
]


class GroupsConfig(RecipeSection):
    """Group-limited routing (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): a token uses experts of few groups."""

    count: int = Field(ge=1, description="equal groups that the experts fall into, in order")
    chosen: int = Field(ge=1, description="groups whose experts one token may use")


class SharedExpertConfig(RecipeSection):
    """A SwiGLU expert that every token uses, beside the routed ones."""

    hidden_size: int = Field(ge=1)
    gate: bool = Field(False, description="weight it by the sigmoid of a learned map of the token (Qwen2-MoE)")


class MoEConfig(RecipeSection):
    """One MoE layer as MoE++ has it (arXiv 2410.07348): FFN experts, and experts that cost next to nothing.

    Expert ids run over the FFN experts, then constant, copy and zero experts.
    """

    ffn_experts: int = Field(8, ge=0)
    expert_hidden_size: int = Field(512, ge=1, description="hidden width of one SwiGLU expert")
    zero_experts: int = Field(1, ge=0, description="experts that answer 0")
    copy_experts: int = Field(1, ge=0, description="experts that answer their input")
    constant_experts: int = Field(2, ge=0, description="experts that mix their input with a learned vector")
    shared: SharedExpertConfig | None = None
    top_k: int = Field(2, ge=1)
    gate_mode: Literal["paper", "released", "mixtral", "sigmoid"] = "paper"
    gate_scale: float = Field(1.0, gt=0, description="factor on the weights of the chosen experts")
    selection_bias: bool = Field(False, description="a bias per expert that decides who is chosen, not how much")
    bias_update_rate: float = Field(0.001, gt=0, description="step of that bias towards an even load, each update")
    groups: GroupsConfig | None = None
    gating_residual: bool = Field(True, description="add a learned map of the previous MoE layer's router logits")
    tau: float = Field(0.75, gt=0, description="weight of zero-computation experts in the balance loss")
    balance_loss_weight: float = Field(0.01, ge=0)
    z_loss_weight: float = Field(0.0, ge=0, description="of the squared log-sum-exp of the router's logits")

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

    def num_params(self, hidden_size: int, ffn_experts: int) -> int:
        """Parameters with `ffn_experts` of the FFN experts counted; without gating residuals."""
        router = self.num_experts * hidden_size + self.selection_bias * self.num_experts
        constants = self.constant_experts * 3 * hidden_size
        shared = 0
        if self.shared:
            shared = 3 * hidden_size * self.shared.hidden_size + self.shared.gate * hidden_size
        return router + constants + shared + ffn_experts * 3 * hidden_size * self.expert_hidden_size

    @model_validator(mode="after")
    def _choices_are_possible(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than all {self.num_experts} experts of a layer")
        if self.gate_mode != "sigmoid" and (self.groups or self.selection_bias):
            raise ValueError(f"groups and selection_bias go with gate_mode=sigmoid, not {self.gate_mode}")
        if self.groups is None:
            return self
        count, chosen = self.groups.count, self.groups.chosen
        if self.num_experts % count or self.num_experts // count < 2:
            raise ValueError(f"groups.count={count} must cut {self.num_experts} experts into equal groups of 2 or more")
        if chosen > count or chosen * (self.num_experts // count) < self.top_k:
            raise ValueError(f"groups.chosen={chosen} of {count} groups leave fewer than top_k={self.top_k} experts")
        return self


class ModelConfig(RecipeSection):
    """A decoder of blocks: attention, then a mixture of experts or, in `dense_layers`, one dense SwiGLU."""

    vocab_size: int | None = Field(None, ge=1, description="left out of a recipe: the tokenizer decides")
    layers: int = Field(4, ge=1)
    hidden_size: int = Field(256, ge=1)
    context_length: int = Field(512, ge=1, description="longest sequence, prompt and answer together, in tokens")
    norm_eps: float = Field(1e-5, gt=0)
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    tie_embeddings: bool = Field(False, description="the output head is the embedding")
    attention: AnyAttention = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    dense_layers: tuple[int, ...] = Field((), description="layers with a dense SwiGLU in place of the experts")
    dense_hidden_size: int | None = Field(None, ge=1, description="its hidden width")

    @property
    def moe_layers(self) -> list[int]:
        """Layers that have experts."""
        return [layer for layer in range(self.layers) if layer not in self.dense_layers]

    def num_params(self) -> int:
        """All parameters, embedding and output head included."""
        return self._params(self.moe.ffn_experts)

    def num_active_params(self) -> int:
        """Parameters a token meets when all its top_k choices are FFN experts: the upper bound of a MoE++ model."""
        return self._params(min(self.moe.top_k, self.moe.ffn_experts))

    def _params(self, ffn_experts: int) -> int:
        assert self.vocab_size is not None, "the vocabulary is not known yet"
        width, sparse = self.hidden_size, len(self.moe_layers)
        both = self.layers * (self.attention.num_params(width) + 2 * width)
        experts = sparse * self.moe.num_params(width, ffn_experts)
        residual_maps = max(sparse - 1, 0) * self.moe.num_experts**2 if self.moe.gating_residual else 0
        dense = (self.layers - sparse) * 3 * width * (self.dense_hidden_size or 0)
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * width
        return both + experts + residual_maps + dense + embeddings + width

    @model_validator(mode="after")
    def _layers_are_there(self) -> ModelConfig:
        outside = [layer for layer in self.dense_layers if not 0 <= layer < self.layers]
        if outside:
            raise ValueError(f"dense_layers={list(self.dense_layers)}: {outside[0]} is not one of {self.layers} layers")
        if self.dense_layers and self.dense_hidden_size is None:
            raise ValueError(f"dense_layers={list(self.dense_layers)} need dense_hidden_size")
        return self
