"""Feed-forward networks without routing: what stands in a dense layer in place of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.system.model.context import Context
from expertmesh.system.model.experts import activate
from expertmesh.system.model.experts_config import MLPConfig, SwiGLUConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.hidden(x_TD))

    def hidden(self, x_TD: torch.Tensor) -> torch.Tensor:
        """silu(gate(x)) * up(x), [T, F]."""
        return F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD)


class DenseSwiGLU(SwiGLU):
    """Stands where a MoE layer could: it is called like one, sends nothing anywhere and decides nothing."""

    def __init__(self, config: SwiGLUConfig, hidden_size: int) -> None:
        super().__init__(hidden_size, config.hidden_size)
        self.config = config

    def forward(  # type: ignore[override]
        self, x_TD: torch.Tensor, previous: Routing | None, context: Context
    ) -> tuple[torch.Tensor, Routing | None]:
        width = self.config.width(context.width)  # less than all of it in a nested model
        gate_TF = F.linear(x_TD, self.gate_proj.weight[:width])
        up_TF = F.linear(x_TD, self.up_proj.weight[:width])
        return F.linear(F.silu(gate_TF) * up_TF, self.down_proj.weight[:, :width]), None


class MLP(nn.Module):
    """down(act(up(x))), no biases."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(activate(self.up_proj(x_TD), self.activation))


class DenseMLP(MLP):
    """Stands where a MoE layer could, like `DenseSwiGLU`."""

    def __init__(self, config: MLPConfig, hidden_size: int) -> None:
        super().__init__(hidden_size, config.hidden_size, config.activation)

    def forward(  # type: ignore[override]
        self, x_TD: torch.Tensor, previous: Routing | None, context: Context
    ) -> tuple[torch.Tensor, Routing | None]:
        return super().forward(x_TD), None
