"""The kinds of attention that a block may have, as data. What each computes is in the file of its name.

gqa       grouped queries (Llama, Mixtral, Qwen, Step-3)                                   attention.py
mla       keys and values made from a narrow latent vector (DeepSeek)                      latent_attention.py
mixture   attention experts with a router: chosen (ModuleFormer) or mixed softly (BAM)     mixture_attention.py
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from expertmesh.parallel.recipe_section import RecipeSection, kind_or
from expertmesh.system.model.moe_config import GateConfig

Weighting = Literal["softmax", "stick_breaking"]
Shape = tuple[int, int]


def _query_params(hidden_size: int, width: int, rank: int | None) -> int:
    """Of the map to queries: one matrix, or two with a norm between them."""
    return hidden_size * width if rank is None else rank * (hidden_size + 1 + width)


class _Counted(RecipeSection):
    """A kind of attention whose parameters can be counted."""

    values_in_keys: ClassVar[bool] = False
    """Whether a cached value is the first numbers of its key, and so need not be kept."""

    def num_params(self, hidden_size: int) -> int:
        raise NotImplementedError

    def num_active_params(self, hidden_size: int) -> int:
        """Those that one token meets: all of them, but where attention has experts."""
        return self.num_params(hidden_size)


class AttentionConfig(_Counted):
    """Grouped-query attention.

    With `query_rank` and one key-value head it is multi-matrix factorization attention (Step-3, arXiv 2412.19255).
    """

    kind: Literal["gqa"] = "gqa"
    heads: int = Field(8, ge=1)
    kv_heads: int = Field(4, ge=1, description="key and value heads, each shared by heads / kv_heads query heads")
    head_dim: int = Field(32, ge=2, multiple_of=2)
    rope_theta: float | None = Field(10_000.0, gt=0, description="base of the rotary positions; null: none")
    weighting: Weighting = Field("softmax", description="how a token weights what it sees")
    query_rank: int | None = Field(None, ge=1, description="width of a vector that the queries are made from")
    qk_norm: Literal["none", "head", "width"] = Field("none", description="RMSNorm of queries and keys, over what")
    qkv_bias: bool = False
    output_bias: bool = False
    output_gate: Literal["none", "head", "element"] = Field(
        "none", description="sigmoid gate of the token on each head's answer, or on each number of it"
    )
    sliding_window: int | None = Field(None, ge=1, description="how many tokens back, itself included, a token sees")

    @property
    def key_shape(self) -> Shape:
        """(heads, width) of the keys that a cache holds for one token."""
        return self.kv_heads, self.head_dim

    @property
    def value_shape(self) -> Shape:
        return self.kv_heads, self.head_dim

    @property
    def gate_width(self) -> int:
        """Numbers that the output gate makes of one token."""
        return {"none": 0, "head": self.heads, "element": self.heads * self.head_dim}[self.output_gate]

    def num_params(self, hidden_size: int) -> int:
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms = {"none": 0, "head": 2 * self.head_dim, "width": query + kv}[self.qk_norm]
        biases = self.qkv_bias * (query + 2 * kv) + self.output_bias * hidden_size
        made = _query_params(hidden_size, query, self.query_rank)
        return made + hidden_size * (query + 2 * kv + self.gate_width) + norms + biases

    @model_validator(mode="after")
    def _groups_are_whole(self) -> AttentionConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        return self


class MLAConfig(_Counted):
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
    def key_shape(self) -> Shape:
        """(heads, width) of the keys that a cache holds for one token: the narrow vector and the rotary part."""
        return 1, self.kv_rank + self.rope_head_dim

    @property
    def value_shape(self) -> Shape:
        return 1, self.kv_rank

    values_in_keys: ClassVar[bool] = True

    def num_params(self, hidden_size: int) -> int:
        width = self.heads * (self.nope_head_dim + self.rope_head_dim)
        queries = _query_params(hidden_size, width, self.query_rank)
        latent = hidden_size * (self.kv_rank + self.rope_head_dim) + self.kv_rank
        expand = self.kv_rank * self.heads * (self.nope_head_dim + self.value_head_dim)
        return queries + latent + expand + self.heads * self.value_head_dim * hidden_size


class MixtureAttentionConfig(_Counted):
    """Experts that are attentions: each has its own queries and output; keys and values are shared, or its own.

    A token uses `top_k` of them, weighted by the router's probabilities, not renormalised: ModuleFormer's mixture of
    attention heads (arXiv 2306.04640). With top_k = experts all are mixed softly: BAM (arXiv 2408.08274).
    """

    kind: Literal["mixture"]
    experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    heads: int = Field(ge=1, description="query heads of one expert")
    kv_heads: int = Field(ge=1, description="key and value heads, each shared by heads / kv_heads query heads")
    head_dim: int = Field(ge=2, multiple_of=2)
    own_kv: bool = Field(False, description="each expert has keys and values of its own; needs top_k = experts")
    kv_bias: bool = False
    rope_theta: float | None = Field(10_000.0, gt=0, description="base of the rotary positions; null: none")
    weighting: Weighting = Field("softmax", description="how a token weights what it sees")
    gate: GateConfig | None = Field(None, description="null: one matrix")
    balance_loss_weight: float = Field(0.0, ge=0, description="of the router's mutual-information loss")

    @property
    def cached_heads(self) -> int:
        return self.kv_heads * (self.experts if self.own_kv else 1)

    @property
    def key_shape(self) -> Shape:
        """(heads, width) of the keys that a cache holds for one token."""
        return self.cached_heads, self.head_dim

    @property
    def value_shape(self) -> Shape:
        return self.cached_heads, self.head_dim

    def num_params(self, hidden_size: int) -> int:
        kv = self.cached_heads * self.head_dim
        gate = self.experts * hidden_size if self.gate is None else self.gate.num_params(hidden_size, self.experts)
        return gate + self.experts * self._expert_params(hidden_size) + 2 * kv * (hidden_size + self.kv_bias)

    def num_active_params(self, hidden_size: int) -> int:
        unused = self.experts - self.top_k
        return self.num_params(hidden_size) - unused * self._expert_params(hidden_size)

    def _expert_params(self, hidden_size: int) -> int:
        """Of the queries and outputs of one expert."""
        return 2 * self.heads * self.head_dim * hidden_size

    @model_validator(mode="after")
    def _choices_are_possible(self) -> MixtureAttentionConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} is more than experts={self.experts}")
        if self.own_kv and self.top_k < self.experts:
            raise ValueError(
                f"own_kv with top_k={self.top_k} of experts={self.experts}: an expert that a token did not choose "
                "would have no keys for later ones; take top_k=experts"
            )
        return self


AnyAttention = Annotated[
    AttentionConfig | MLAConfig | MixtureAttentionConfig, Field(discriminator="kind"), kind_or("gqa")
]
