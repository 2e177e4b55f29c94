"""Attention experts: each token is answered by the few that its router chose, or by all of them mixed softly.

    y = sum over the chosen e of p_e W_o^e attend(W_q^e x, K, V)          p = softmax(gate(x)), not renormalised

ModuleFormer's mixture of attention heads (arXiv 2306.04640; `parallel_experts.py` and the model of its released code):
K and V are the same for all experts, so one cache serves whatever a later token chooses. BAM (arXiv 2408.08274, section
3) mixes all experts; each may then have keys and values of its own.

All experts are on every rank that attends: nothing travels, and what a router of routed experts calls dispatch and
combine is here a sort of rows.

Legend: T tokens, D model width, N experts, K of them a token, R = T*K rows sorted by expert, X numbers of one expert's
query heads, G key-value heads, H = K*heads query heads of a token, d head width.
"""

from __future__ import annotations

import torch
from torch import nn

from expertmesh.kernels.combine import combine_rows
from expertmesh.kernels.grouped_gemm import grouped_gemm
from expertmesh.kernels.routing import Routing, SlotOrder, route, sort_slots
from expertmesh.kernels.rows import gather_rows
from expertmesh.system.model.attend import Look
from expertmesh.system.model.attention_config import MixtureAttentionConfig
from expertmesh.system.model.context import Context
from expertmesh.system.model.gate import LinearGate, TwoLayerGate
from expertmesh.system.model.rotary import rotate


class MixtureAttention(nn.Module):
    """What a token goes through:

    1. route: K experts and their weights; a row for each choice, sorted by expert
    2. queries: one grouped GEMM, then put beside those that ask the same key-value heads
    3. attend: the heads of all choices together
    4. outputs: back to rows, one grouped GEMM, summed by weight
    """

    def __init__(self, config: MixtureAttentionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.look = Look(weighting=config.weighting)
        query, kv = config.heads * config.head_dim, config.cached_heads * config.head_dim
        self.gate: nn.Module
        if config.gate is None:
            self.gate = LinearGate(hidden_size, config.experts)
        else:
            self.gate = TwoLayerGate(config.gate, hidden_size, config.experts)
        self.q_proj = nn.Parameter(torch.empty(config.experts, query, hidden_size))
        self.k_proj = nn.Linear(hidden_size, kv, bias=config.kv_bias)
        self.v_proj = nn.Linear(hidden_size, kv, bias=config.kv_bias)
        self.o_proj = nn.Parameter(torch.empty(config.experts, hidden_size, query))

    def forward(self, x_TD: torch.Tensor, context: Context) -> tuple[torch.Tensor, Routing]:
        config, positions_T = self.config, context.positions_T
        routing = route(self.gate(x_TD), config.top_k, "paper")
        order = sort_slots(routing.experts_TK, config.experts)
        places_R = self._places(routing, order)

        q_RX = grouped_gemm(gather_rows(x_TD, order.slots_R // config.top_k), self.q_proj, order.counts_E)
        q_THd = self._as_heads(q_RX.index_select(0, places_R.argsort()))
        k_TGd, v_TGd = (project(x_TD).unflatten(-1, (-1, config.head_dim)) for project in (self.k_proj, self.v_proj))
        q_THd = rotate(q_THd, positions_T, config.rope_theta)
        k_TGd = rotate(k_TGd, positions_T, config.rope_theta)

        o_THd = context.attend(context.layer, q_THd, k_TGd, v_TGd, self.look)
        o_RX = self._as_choices(o_THd).index_select(0, places_R)
        rows_RD = grouped_gemm(o_RX, self.o_proj, order.counts_E)
        return combine_rows(rows_RD, order.slots_R, routing.weights_TK), routing

    def _places(self, routing: Routing, order: SlotOrder) -> torch.Tensor:
        """[R] int64: which of the T*K choices, in the order in which they attend, each row is: a permutation.

        Where experts share keys, a token's choices stay in its own order. Where each has its own, choice k must be the
        same expert for every token: then all are chosen, and the choices stand in order of expert.
        """
        if not self.config.own_kv:
            return order.slots_R
        top_k = self.config.top_k
        return order.slots_R // top_k * top_k + routing.experts_TK.flatten()[order.slots_R]

    def _as_heads(self, q_SX: torch.Tensor) -> torch.Tensor:
        """q_THd of the choices S = T*K; query heads that read one key-value head lie together, as `Attend` wants it."""
        config = self.config
        group = config.heads // config.kv_heads
        q_TKGhd = q_SX.view(-1, config.top_k, config.kv_heads, group, config.head_dim)
        return (q_TKGhd if config.own_kv else q_TKGhd.transpose(1, 2)).flatten(1, 3)

    def _as_choices(self, o_THd: torch.Tensor) -> torch.Tensor:
        """o_SX: the way back."""
        config = self.config
        if config.own_kv:
            return o_THd.reshape(-1, config.heads * config.head_dim)
        group = config.heads // config.kv_heads
        o_TGKhd = o_THd.view(-1, config.kv_heads, config.top_k, group, config.head_dim)
        return o_TGKhd.transpose(1, 2).reshape(-1, config.heads * config.head_dim)
