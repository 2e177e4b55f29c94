"""The two kinds of experts of a MoE++ layer: those that compute, held in shards, and those that cost almost nothing."""

from __future__ import annotations

import torch
from torch import nn

from expertmesh.kernels.grouped_swiglu import grouped_swiglu
from expertmesh.kernels.routing import Routing
from expertmesh.kernels.zero_computation import zero_computation
from expertmesh.system.model.config import MoEConfig


class RoutedExperts(nn.Module):
    """The FFN half of a block: the SwiGLU experts of `shard`, a range of this layer's FFN experts, possibly empty."""

    def __init__(self, config: MoEConfig, hidden_size: int, shard: range) -> None:
        super().__init__()
        self.shard = shard
        self.gate_up = nn.Parameter(torch.empty(len(shard), 2 * config.expert_hidden_size, hidden_size))
        self.down = nn.Parameter(torch.empty(len(shard), hidden_size, config.expert_hidden_size))

    def forward(self, rows_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """rows_RD sorted by expert, counts_E rows for each expert of the shard; returns one row for each."""
        return grouped_swiglu(rows_RD, counts_E, self.gate_up, self.down)


class ZeroComputationExperts(nn.Module):
    """Zero, copy and constant experts (arXiv 2410.07348, section 3.1), evaluated where the token is."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.mix = nn.Parameter(torch.empty(config.constant_experts, 2, hidden_size))
        self.constant = nn.Parameter(torch.empty(config.constant_experts, hidden_size))

    def forward(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        return zero_computation(
            x_TD,
            routing.experts_TK,
            routing.weights_TK,
            self.config.ffn_experts,
            self.mix,
            self.constant,
            self.config.copy_experts,
        )
