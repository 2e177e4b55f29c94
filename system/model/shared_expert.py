"""The expert that every token uses, and how its answer s and the routed experts' answer r come together.

sum       r + s                                                              DeepSeek-V3
sigmoid   r + sigmoid(W x) s,  W [1, D]                                      Qwen2-MoE
softmax   c0 r + c1 s,  [c0, c1] = softmax(W x + b),  W [2, D]               DeepSpeed-MoE (arXiv 2201.05596) as
                                                                             released; the paper has the sum
mean      (r + s) / 2                                                        AdaMoE (arXiv 2510.14300)
"""

from __future__ import annotations

import torch
from torch import nn

from expertmesh.system.model.dense import MLP, SwiGLU
from expertmesh.system.model.moe_config import Mixing, SharedExpertConfig, SharedMLPConfig


class Sum(nn.Module):
    def forward(self, x_TD: torch.Tensor, routed_TD: torch.Tensor, shared_TD: torch.Tensor) -> torch.Tensor:
        return routed_TD + shared_TD


class Mean(nn.Module):
    def forward(self, x_TD: torch.Tensor, routed_TD: torch.Tensor, shared_TD: torch.Tensor) -> torch.Tensor:
        return (routed_TD + shared_TD) / 2


class SigmoidGate(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def forward(self, x_TD: torch.Tensor, routed_TD: torch.Tensor, shared_TD: torch.Tensor) -> torch.Tensor:
        return routed_TD + (x_TD @ self.weight.T).sigmoid() * shared_TD


class SoftmaxGate(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, hidden_size))
        self.bias = nn.Parameter(torch.empty(2))

    def forward(self, x_TD: torch.Tensor, routed_TD: torch.Tensor, shared_TD: torch.Tensor) -> torch.Tensor:
        shares_T2 = (x_TD @ self.weight.T + self.bias).float().softmax(dim=-1).type_as(x_TD)
        return shares_T2[:, :1] * routed_TD + shares_T2[:, 1:] * shared_TD


def build_mixing(mixing: Mixing, hidden_size: int) -> nn.Module:
    """A module that takes (x_TD, routed_TD, shared_TD) and returns y_TD."""
    if mixing == "sigmoid":
        return SigmoidGate(hidden_size)
    if mixing == "softmax":
        return SoftmaxGate(hidden_size)
    return Mean() if mixing == "mean" else Sum()


def build_shared_expert(config: SharedExpertConfig | SharedMLPConfig, hidden_size: int) -> nn.Module:
    """A module that takes x_TD and returns shared_TD."""
    if isinstance(config, SharedMLPConfig):
        return MLP(hidden_size, config.hidden_size, config.activation)
    return SwiGLU(hidden_size, config.hidden_size)
