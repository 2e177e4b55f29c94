"""The router: which experts a token goes to, helped by what the layer before decided for it."""

from __future__ import annotations

import torch
from torch import nn

from expertmesh.kernels.routing import Routing, route
from expertmesh.system.model.config import MoEConfig


class Router(nn.Module):
    """One linear map to expert logits, plus the gating residual of MoE++ (arXiv 2410.07348, equation 6).

    Everything is float32, whatever the dtype of the model: a rounded logit sends a token elsewhere.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, follows_moe: bool) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.gate_map: nn.Parameter | None = None
        if config.gating_residual and follows_moe:
            self.gate_map = nn.Parameter(torch.empty(config.num_experts, config.num_experts))

    def forward(self, x_TD: torch.Tensor, previous_logits_TN: torch.Tensor | None) -> Routing:
        logits_TN = x_TD.float() @ self.weight.float().T
        if self.gate_map is not None:
            assert previous_logits_TN is not None, "a gating residual needs the logits of the layer before"
            logits_TN = logits_TN + previous_logits_TN @ self.gate_map.float().T
        return route(logits_TN, self.config.top_k, self.config.gate_mode, zero_experts=self.config.zero_experts)
