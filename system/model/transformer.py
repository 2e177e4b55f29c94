"""The decoder: embedding, blocks, final norm, output head. Trained, served whole and served split by this one class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.parallel.dispatchers import Dispatcher
from expertmesh.parallel.placement import expert_shard
from expertmesh.system.model.attention import Attend, build_attention
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.dense import DenseFFN
from expertmesh.system.model.experts import RoutedExperts
from expertmesh.system.model.moe import MoE


class Block(nn.Module):
    """Attention half: norm, attention, residual, norm, router, zero-computation and shared experts, dense layers.

    FFN half: `mlp.experts`, the routed experts; on a worker of the attention pool it holds none.
    """

    def __init__(self, config: ModelConfig, layer: int, shard: range) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = build_attention(config.attention, config.hidden_size, layer, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp: MoE | DenseFFN
        if layer in config.dense_layers:
            self.mlp = DenseFFN(config.hidden_size, config.dense_hidden_size or 0)
        else:
            follows_moe = layer > config.moe_layers[0]
            self.mlp = MoE(config.moe, config.hidden_size, layer, shard, follows_moe)

    def forward(
        self,
        x_TD: torch.Tensor,
        positions_T: torch.Tensor,
        previous_logits_TN: torch.Tensor | None,
        attend: Attend,
        dispatcher: Dispatcher,
    ) -> tuple[torch.Tensor, Routing | None]:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), positions_T, attend)
        y_TD, routing = self.mlp(self.post_attention_layernorm(x_TD), previous_logits_TN, dispatcher)
        return x_TD + y_TD, routing


class ModelOutput(NamedTuple):
    hidden_TD: torch.Tensor  # after the final norm; `Transformer.lm_head` makes logits of it
    routings: list[Routing]  # one for each layer that has experts


class Transformer(nn.Module):
    """`expert_rank` of `expert_size` says which part of every layer's FFN experts is held here.

    `expert_size` 0 holds none. Weights are uninitialised: `weights.initialise` or `checkpoint.load_weights` fills them.
    """

    def __init__(self, config: ModelConfig, expert_rank: int = 0, expert_size: int = 1) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is not known yet"
        self.config = config
        held = expert_shard(config.moe.ffn_experts, expert_rank, expert_size) if expert_size else range(0)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, held) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, tokens_T: torch.Tensor, positions_T: torch.Tensor, attend: Attend, dispatcher: Dispatcher
    ) -> ModelOutput:
        x_TD = self.embed_tokens(tokens_T)
        routings: list[Routing] = []
        for block in self.layers:
            previous_logits_TN = routings[-1].logits_TN if routings else None
            x_TD, routing = block(x_TD, positions_T, previous_logits_TN, attend, dispatcher)
            if routing is not None:
                routings.append(routing)
        return ModelOutput(self.norm(x_TD), routings)

    def balance(self, load_LN: torch.Tensor) -> None:
        """After an update, move the selection biases of routers that have one; load_LN as in `BatchLoss`."""
        for layer, load_N in zip(self.config.moe_layers, load_LN, strict=True):
            self.layers[layer].mlp.gate.balance(load_N)


class ExpertPool(nn.Module):
    """The FFN halves alone: what a worker of the FFN pool holds. Parameter names equal those of `Transformer`."""

    def __init__(self, config: ModelConfig, expert_rank: int, expert_size: int) -> None:
        super().__init__()
        held = expert_shard(config.moe.ffn_experts, expert_rank, expert_size)
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(config.layers))
        for layer in config.moe_layers:
            experts = RoutedExperts(config.moe, config.hidden_size, held)
            self.layers[layer]["mlp"] = nn.ModuleDict({"experts": experts})

    def forward(self, layer: int, rows_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """Rows of layer `layer`, sorted by the experts held here."""
        return self.layers[layer]["mlp"]["experts"](rows_RD, counts_E)
