"""The expert that every token uses, and how its answer and the routed experts' come together."""

from __future__ import annotations

import torch
from torch import nn

from expertmesh.system.model.dense import SwiGLU
from expertmesh.system.model.moe_config import SharedExpertConfig


class SharedExpert(SwiGLU):
    """A SwiGLU beside the routed experts. `forward` gives its answer, `mix` adds the routed ones.

    sum       routed + shared
    sigmoid   routed + sigmoid(W x) shared                                          Qwen2-MoE
    softmax   c0 routed + c1 shared, [c0, c1] = softmax(W x + b)                    DeepSpeed-MoE, arXiv 2201.05596
    mean      (routed + shared) / 2                                                 AdaMoE, arXiv 2510.14300
    """

    def __init__(self, config: SharedExpertConfig, hidden_size: int) -> None:
        super().__init__(hidden_size, config.hidden_size)
        self.mixing = config.mixing
        self.gate: nn.Linear | None = None
        if config.mixing in ("sigmoid", "softmax"):
            outputs = 1 if config.mixing == "sigmoid" else 2
            self.gate = nn.Linear(hidden_size, outputs, bias=config.mixing == "softmax")

    def mix(self, x_TD: torch.Tensor, shared_TD: torch.Tensor, routed_TD: torch.Tensor) -> torch.Tensor:
        if self.mixing == "mean":
            return (routed_TD + shared_TD) / 2
        if self.gate is None:
            return routed_TD + shared_TD
        gates = self.gate(x_TD)
        if self.mixing == "sigmoid":
            return routed_TD + shared_TD * gates.sigmoid()
        routed_T1, shared_T1 = gates.float().softmax(-1).type_as(x_TD).split(1, dim=-1)
        return routed_TD * routed_T1 + shared_TD * shared_T1
