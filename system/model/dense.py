"""SwiGLU without routing: what stands in a dense layer in place of experts, and the expert that every token shares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from expertmesh.kernels.routing import Routing
from expertmesh.parallel.dispatchers import Dispatcher


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class DenseFFN(SwiGLU):
    """Stands where a MoE layer could: it is called like one, sends nothing anywhere and decides nothing."""

    def forward(  # type: ignore[override]
        self, x_TD: torch.Tensor, previous_logits_TN: torch.Tensor | None, dispatcher: Dispatcher
    ) -> tuple[torch.Tensor, Routing | None]:
        return super().forward(x_TD), None
