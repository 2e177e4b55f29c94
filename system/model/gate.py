"""From a token to a logit for each of the experts it may choose: one matrix, or two with a narrow vector between them.

Everything is float32, whatever the dtype of the model: a rounded logit sends a token elsewhere.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from expertmesh.system.model.moe_config import GateConfig


class LinearGate(nn.Module):
    """W x."""

    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD.float() @ self.weight.float().T


class TwoLayerGate(nn.Module):
    """W2 act(W1 x + b): the released MoE++ (tanh, no bias), ModuleFormer (gelu, bias)."""

    def __init__(self, config: GateConfig, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.activation = torch.tanh if config.activation == "tanh" else functional.gelu
        self.inner = nn.Linear(hidden_size, config.hidden_size, bias=config.bias)
        self.outer = nn.Linear(config.hidden_size, experts, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        bias = None if self.inner.bias is None else self.inner.bias.float()
        inner_TI = self.activation(functional.linear(x_TD.float(), self.inner.weight.float(), bias))
        return inner_TI @ self.outer.weight.float().T
