"""The mixture-of-experts layer: the whole story of a token on one screen."""

from __future__ import annotations

from itertools import chain, repeat

import torch
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.parallel.dispatchers import ExpertLayer
from expertmesh.parallel.expert_copies import Answer, ExpertCopies
from expertmesh.system.model.build_experts import build_experts, build_frame
from expertmesh.system.model.context import Context
from expertmesh.system.model.experts import ZeroComputationExperts
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.router import Router
from expertmesh.system.model.shared_expert import build_mixing, build_shared_expert


class MoE(nn.Module):
    """What a token goes through:

    1. route: the router picks top-k experts and their weights; later steps are functions of that decision
    2. dispatch: the token leaves for the ranks that hold the FFN experts it chose
    3. the shared expert answers here, while the rows are on their way
    4. experts: this rank computes the rows it was sent, one grouped GEMM for each part that arrives; that happens as
       combine asks for the answers, which leave while the next part is computed
    5. combine: answers come back and are summed by weight, and zero-computation experts answer here in the same pass

    In training, copies of hot experts may set out for all ranks before that. They answer the first part of the rows,
    which stays where its tokens are (expert_copies.py).

    `frame` may change what the routed experts see, and the sum of their answers; most kinds of experts have none.

    `shard` is the range of FFN experts held here: all of them, a part (expert parallel), or none (an attention worker,
    whose dispatcher sends every row to the FFN pool).
    """

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int, shard: range, follows_moe: bool) -> None:
        super().__init__()
        self.experts_of_layer = ExpertLayer(layer, config.ffn_experts)
        # The released models double (top_k times) what an expert sees (moe_plus_plus_layer.py).
        self.input_scale = config.top_k if config.gate_mode == "released" else 1
        self.gate = Router(config, hidden_size, follows_moe)
        self.zero_computation = ZeroComputationExperts(config, hidden_size)
        self.frame = build_frame(config, hidden_size)
        self.experts = build_experts(config, hidden_size, shard)
        self.copies: ExpertCopies | None = None
        self.shared_expert: nn.Module | None = None
        if config.shared:
            self.shared_expert = build_shared_expert(config.shared, hidden_size)
            self.shared_expert_gate = build_mixing(config.shared.mixing, hidden_size)

    def copy_experts(self, copies: ExpertCopies | None) -> None:
        """From the next pass on every rank answers its own tokens of the experts of `copies`."""
        self.copies = copies
        self.experts_of_layer = self.experts_of_layer._replace(copied=copies.experts if copies else ())

    def forward(self, x_TD: torch.Tensor, previous: Routing | None, context: Context) -> tuple[torch.Tensor, Routing]:
        copies = [self.copies.set_out(self.experts)] if self.copies else []
        routing = self.gate(x_TD, previous, context)
        x_TD = x_TD * self.input_scale
        inner_TD = self.frame.enter(x_TD)
        asked = self.experts_of_layer._replace(width=context.width)
        arriving, handle = context.dispatcher.dispatch(inner_TD, routing, asked)
        shared_TD = self.shared_expert(x_TD) if self.shared_expert else None
        holders = chain[Answer](copies, repeat(self.experts))
        answers = (experts(rows, context) for experts, rows in zip(holders, arriving, strict=False))
        zero = self.zero_computation(inner_TD, routing)
        y_TD = self.frame.leave(context.dispatcher.combine(answers, handle, zero))
        return self.shared_expert_gate(x_TD, y_TD, shared_TD) if self.shared_expert else y_TD, routing
