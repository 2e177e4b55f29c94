"""The architecture as data: what a recipe's `model` section and a checkpoint's `config.json` hold.

A model is one block repeated. What varies between architectures is which part stands in which place of it:

    attention     attention_config.py   grouped queries, latent, or a mixture of attentions
    experts       moe_config.py         routed, zero-computation and shared experts, and the router
    dense         experts_config.py     what stands in `dense_layers` in place of the experts
    block         here                  the order of the two halves, the norms, which layers share parts or are skipped
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from expertmesh.parallel.recipe_section import RecipeSection
from expertmesh.system.model.attention_config import AnyAttention, AttentionConfig
from expertmesh.system.model.experts_config import AnyDense, SwiGLUConfig
from expertmesh.system.model.moe_config import MoEConfig


class DepthConfig(RecipeSection):
    """Mixture of depths: in these layers a router sends some tokens through and the others past (gamma-MoD)."""

    layers: tuple[int, ...] = Field(min_length=1)
    kept: float = Field(0.5, gt=0, le=1, description="share of a training sequence's tokens that go through")
    threshold: float = Field(0.5, ge=0, le=1, description="while serving, a token goes through above this probability")
    shared_router: bool = Field(True, description="one router for all of these layers")
    loss_weight: float = Field(0.01, ge=0, description="of the loss that teaches the router whom it sent through")

    def tokens(self, sequence_length: int) -> int:
        """How many of a training sequence go through."""
        # A hair less than the product, which floats may put above a whole number that it equals.
        return math.ceil(self.kept * sequence_length - 1e-9)


class ModelConfig(RecipeSection):
    """A decoder of blocks: attention, then a mixture of experts or, in `dense_layers`, one dense network."""

    vocab_size: int | None = Field(None, ge=1, description="left out of a recipe: the tokenizer decides")
    layers: int = Field(4, ge=1)
    hidden_size: int = Field(256, ge=1)
    context_length: int = Field(512, ge=1, description="longest sequence, prompt and answer together, in tokens")
    norm: Literal["rms", "layer"] = Field("rms", description="RMSNorm, or LayerNorm with a bias")
    norm_eps: float = Field(1e-5, gt=0)
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    tie_embeddings: bool = Field(False, description="the output head is the embedding")
    block: Literal["sequential", "parallel"] = Field(
        "sequential", description="experts read what attention wrote, or both read the same (one norm)"
    )
    share_layers: bool = Field(False, description="all layers have the attention and experts of the first (WideNet)")
    attention: AnyAttention = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    dense_layers: tuple[int, ...] = Field((), description="layers with a dense network in place of the experts")
    dense: AnyDense | None = Field(None, description="the network of dense_layers")
    depth: DepthConfig | None = Field(None, description="layers that only some tokens go through")

    @property
    def moe_layers(self) -> list[int]:
        """Layers that have experts."""
        return [layer for layer in range(self.layers) if layer not in self.dense_layers]

    @property
    def nested_shares(self) -> tuple[float, ...]:
        """Shares of the width of nested networks that are trained to work alone."""
        networks = [self.moe.expert] * bool(self.moe_layers) + [self.dense] * bool(self.dense_layers)
        found = {network.nested for network in networks if isinstance(network, SwiGLUConfig) and network.nested}
        return found.pop() if found else ()

    def moe_of(self, layer: int) -> MoEConfig:
        """The experts of MoE layer `layer`, which a pyramid gives a number of its own."""
        if not self.moe.pyramid:
            return self.moe
        count = self.moe.pyramid[self.moe_layers.index(layer)]
        return self.moe.model_copy(update={"ffn_experts": count, "pyramid": ()})

    def num_params(self) -> int:
        """All parameters, embedding and output head included."""
        return self._params(all_experts=True)

    def num_active_params(self) -> int:
        """Parameters a token meets when all its top_k choices are FFN experts: the upper bound of a MoE++ model."""
        return self._params(all_experts=False)

    def _params(self, all_experts: bool) -> int:
        assert self.vocab_size is not None, "the vocabulary is not known yet"
        width, sparse = self.hidden_size, self.moe_layers
        attention = self.attention
        counted = attention.num_params(width) if all_experts else attention.num_active_params(width)
        attentions = [counted] * self.layers
        experts = []
        for layer in sparse:
            moe = self.moe_of(layer)
            experts.append(moe.num_params(width, moe.ffn_experts if all_experts else min(moe.top_k, moe.ffn_experts)))
        if self.share_layers:
            attentions, experts = attentions[:1], experts[:1]
        residual_maps = max(len(sparse) - 1, 0) * self.moe.num_experts**2 if self.moe.gating_residual else 0
        dense = len(self.dense_layers) * self.dense.num_params(width) if self.dense else 0
        norm = width * (2 if self.norm == "layer" else 1)
        norms = (self.layers * (1 if self.block == "parallel" else 2) + 1) * norm
        routers = 0
        if self.depth:
            routers = 2 * width * (1 if self.depth.shared_router else len(self.depth.layers))
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * width
        return sum(attentions) + sum(experts) + residual_maps + dense + norms + routers + embeddings

    @model_validator(mode="after")
    def _layers_are_there(self) -> ModelConfig:
        for key, layers in (
            ("dense_layers", self.dense_layers),
            ("depth.layers", self.depth.layers if self.depth else ()),
        ):
            outside = [layer for layer in layers if not 0 <= layer < self.layers]
            if outside:
                raise ValueError(f"{key}={list(layers)}: {outside[0]} is not one of {self.layers} layers")
            if len(set(layers)) < len(layers):
                raise ValueError(f"{key}={list(layers)} names a layer twice")
        if self.dense_layers and self.dense is None:
            raise ValueError(f"dense_layers={list(self.dense_layers)} need dense, such as dense.hidden_size=1024")
        if self.moe.pyramid and len(self.moe.pyramid) != len(self.moe_layers):
            raise ValueError(
                f"moe.ffn_experts={list(self.moe.pyramid)} are {len(self.moe.pyramid)} numbers "
                f"for {len(self.moe_layers)} MoE layers"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelConfig:
        residual = self.moe.gating_residual and len(self.moe_layers) > 1
        if self.share_layers and (residual or self.dense_layers or self.moe.pyramid):
            raise ValueError("share_layers=true goes with MoE layers that are all alike and moe.gating_residual=false")
        if self.depth and residual:
            raise ValueError("depth goes with moe.gating_residual=false: a skipped token has no logits to pass on")
        if self.depth and self.moe.balance_over == "sequence":
            raise ValueError("depth goes with another moe.balance_over than sequence: some of its tokens are left out")
        experts, dense = self.moe.expert, self.dense
        if self.moe_layers:
            experts.check(self.hidden_size)
        if dense is not None:
            dense.check(self.hidden_size)
        if isinstance(experts, SwiGLUConfig) and isinstance(dense, SwiGLUConfig) and self.moe_layers:
            if experts.nested != dense.nested:
                raise ValueError(
                    f"moe.expert.nested={list(experts.nested)} and dense.nested={list(dense.nested)} differ"
                )
        if self.dense and self.dense.kind == "versatile" and self.block == "parallel":
            raise ValueError("dense.kind=versatile adds to what attention wrote: take block=sequential")
        return self
