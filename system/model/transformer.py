"""The decoder: embedding, blocks, final norm, output head. Trained, served whole and served split by this one class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.kernels.rows import Rows
from expertmesh.parallel.placement import Placement, expert_shard
from expertmesh.system.model.block import build_blocks, build_norm
from expertmesh.system.model.build_experts import build_experts
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.context import Context, Decisions


class ModelOutput(NamedTuple):
    hidden_TD: torch.Tensor  # after the final norm; `Transformer.lm_head` makes logits of it
    decisions: list[Decisions]  # of each layer

    @property
    def routings(self) -> list[Routing]:
        """One for each layer that has experts."""
        return [decided.experts for decided in self.decisions if decided.experts is not None]


class Transformer(nn.Module):
    """`expert_rank` of `expert_size` says which part of every layer's FFN experts is held here.

    `expert_size` 0 holds none. Weights are uninitialised: `weights.initialise` or `checkpoint.load_weights` fills them.
    """

    def __init__(self, config: ModelConfig, expert_rank: int = 0, expert_size: int = 1) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is not known yet"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = build_blocks(config, shards(config, expert_rank, expert_size))
        self.norm = build_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens_T: torch.Tensor, context: Context) -> ModelOutput:
        x_TD = self.embed_tokens(tokens_T)
        decisions: list[Decisions] = []
        previous: Routing | None = None
        for layer, block in enumerate(self.layers):
            x_TD, decided = block(x_TD, previous, context._replace(layer=layer))
            decisions.append(decided)
            previous = decided.experts or previous
        return ModelOutput(self.norm(x_TD), decisions)

    def balance(self, loads_N: list[torch.Tensor]) -> None:
        """After an update, move the selection biases of routers that have one; the load of each layer with experts."""
        for layer, load_N in zip(self.config.moe_layers, loads_N, strict=True):
            self.layers[layer].mlp.gate.balance(load_N)


class ExpertPool(nn.Module):
    """The FFN halves alone: what a worker of the FFN pool holds. Parameter names equal those of `Transformer`.

    In a layer with a placement its rank's slots are held, in their order; else a contiguous part.
    """

    def __init__(
        self, config: ModelConfig, expert_rank: int, expert_size: int, placements: Mapping[int, Placement] | None = None
    ) -> None:
        super().__init__()
        self.held: list[Sequence[int]] = list(shards(config, expert_rank, expert_size))
        for layer, placement in (placements or {}).items():
            self.held[layer] = placement.held(expert_rank)
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(config.layers))
        for layer in config.moe_layers[:1] if config.share_layers else config.moe_layers:
            experts = build_experts(config.moe_of(layer), config.hidden_size, self.held[layer])
            self.layers[layer]["mlp"] = nn.ModuleDict({"experts": experts})

    def forward(self, layer: int, rows: Rows) -> torch.Tensor:
        """Answers to rows of layer `layer`, sorted by the experts held here."""
        return self.layers[layer]["mlp"]["experts"](rows)


def shards(config: ModelConfig, expert_rank: int, expert_size: int) -> list[range]:
    """The FFN experts of each layer that a rank holds; none in dense layers, nor with `expert_size` 0."""
    return [
        expert_shard(config.moe_of(layer).ffn_experts, expert_rank, expert_size)
        if layer in config.moe_layers and expert_size
        else range(0)
        for layer in range(config.layers)
    ]
