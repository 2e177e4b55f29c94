"""The router: which experts a token goes to, helped by what the MoE layer before decided for it."""

from __future__ import annotations

import torch
from torch import nn

from expertmesh.kernels.routing import ExpertGroups, Routing, route, route_sigmoid
from expertmesh.system.model.config import MoEConfig


class Router(nn.Module):
    """One linear map to expert logits, plus the gating residual of MoE++ (arXiv 2410.07348, equation 6).

    Everything is float32, whatever the dtype of the model: a rounded logit sends a token elsewhere.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, follows_moe: bool) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.e_score_correction_bias: nn.Parameter | None = None  # moved by the load, not by a gradient
        if config.selection_bias:
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.num_experts), requires_grad=False)
        self.groups = ExpertGroups(config.groups.count, config.groups.chosen) if config.groups else None
        self.gate_map: nn.Parameter | None = None
        if config.gating_residual and follows_moe:
            self.gate_map = nn.Parameter(torch.empty(config.num_experts, config.num_experts))

    def forward(self, x_TD: torch.Tensor, previous_logits_TN: torch.Tensor | None) -> Routing:
        logits_TN = x_TD.float() @ self.weight.float().T
        if self.gate_map is not None:
            assert previous_logits_TN is not None, "a gating residual needs the logits of the layer before"
            logits_TN = logits_TN + previous_logits_TN @ self.gate_map.float().T
        config = self.config
        if config.gate_mode == "sigmoid":
            routing = route_sigmoid(logits_TN, config.top_k, self.e_score_correction_bias, self.groups)
        else:
            routing = route(logits_TN, config.top_k, config.gate_mode, zero_experts=config.zero_experts)
        return routing._replace(weights_TK=routing.weights_TK * config.gate_scale)

    @torch.no_grad()
    def balance(self, load_N: torch.Tensor) -> None:
        """Move the selection bias one step towards an even load (auxiliary-loss-free, arXiv 2408.15664, algorithm 1).

        load_N: [N] slots on each expert in the update just made, over all ranks.
        """
        if self.e_score_correction_bias is not None:
            load_N = load_N.float()
            self.e_score_correction_bias += self.config.bias_update_rate * torch.sign(load_N.mean() - load_N)
