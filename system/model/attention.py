"""Grouped-query attention with its options; names as Hugging Face's Llama family has them."""

from __future__ import annotations

import torch
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.system.model.attend import Look
from expertmesh.system.model.attention_config import AttentionConfig
from expertmesh.system.model.context import Context
from expertmesh.system.model.rotary import rotate


class Queries(nn.Module):
    """The map from tokens to queries: one matrix, or two of low rank with a norm between them."""

    def __init__(self, hidden_size: int, width: int, rank: int | None, bias: bool, norm_eps: float) -> None:
        super().__init__()
        self.query_rank = rank
        if rank is None:
            self.q_proj = nn.Linear(hidden_size, width, bias=bias)
        else:
            self.q_a_proj = nn.Linear(hidden_size, rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(rank, eps=norm_eps)
            self.q_b_proj = nn.Linear(rank, width, bias=bias)

    def queries(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.query_rank is None:
            return self.q_proj(x_TD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))


class Attention(Queries):
    """Grouped queries. With `output_gate` it is gated attention (arXiv 2505.06708): a sigmoid before the output map."""

    def __init__(self, config: AttentionConfig, hidden_size: int, norm_eps: float) -> None:
        query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        super().__init__(hidden_size, query, config.query_rank, config.qkv_bias, norm_eps)
        self.config = config
        self.look = Look(config.sliding_window, config.weighting)
        self.k_proj = nn.Linear(hidden_size, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, hidden_size, bias=config.output_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm != "none":
            over_head = config.qk_norm == "head"
            self.q_norm = nn.RMSNorm(config.head_dim if over_head else query, eps=norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim if over_head else kv, eps=norm_eps)
        self.gate_proj: nn.Linear | None = None
        if config.output_gate != "none":
            self.gate_proj = nn.Linear(hidden_size, config.gate_width, bias=False)

    def forward(self, x_TD: torch.Tensor, context: Context) -> tuple[torch.Tensor, Routing | None]:
        config, positions_T = self.config, context.positions_T
        q_THd = self._heads(self.queries(x_TD), self.q_norm)
        k_TGd = self._heads(self.k_proj(x_TD), self.k_norm)
        v_TGd = self.v_proj(x_TD).unflatten(-1, (-1, config.head_dim))
        q_THd = rotate(q_THd, positions_T, config.rope_theta)
        k_TGd = rotate(k_TGd, positions_T, config.rope_theta)
        o_THd = context.attend(context.layer, q_THd, k_TGd, v_TGd, self.look)
        if self.gate_proj is not None:  # one number for a head, or one for each of a head's
            o_THd = o_THd * self.gate_proj(x_TD).sigmoid().unflatten(-1, (config.heads, -1))
        return self.o_proj(o_THd.flatten(1)), None

    def _heads(self, x_TX: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Cut the width into heads; the norm takes one head or the whole width as a row."""
        split = (-1, self.config.head_dim)
        if self.config.qk_norm == "width":
            return norm(x_TX).unflatten(-1, split)
        return norm(x_TX.unflatten(-1, split))
