"""The two kinds of experts of a MoE++ layer: those that compute, held in shards, and those that cost almost nothing.

Which network a computing expert is, its config says (experts_config.py); all are built, held and called alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from expertmesh.kernels.grouped_gemm import grouped_gemm
from expertmesh.kernels.grouped_swiglu import grouped_swiglu
from expertmesh.kernels.routing import Routing
from expertmesh.kernels.rows import Rows
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.system.model.context import AS_TRAINED, AnyContext
from expertmesh.system.model.experts_config import MLPConfig, SwiGLUConfig
from expertmesh.system.model.moe_config import MoEConfig


class RoutedExperts(nn.Module):
    """The FFN half of a block: the experts of `shard`, some of this layer's FFN experts, possibly none.

    Each parameter has the experts in its first dimension. `PARTS` gives, for each parameter, the names that one
    expert's tensor has in a checkpoint; where there are several, they are stacked in its first dimension.
    """

    PARTS: ClassVar[dict[str, tuple[str, ...]]]

    def __init__(self, shard: Sequence[int]) -> None:
        super().__init__()
        self.shard = shard
        self.num_experts = len(shard)  # of the layer on all ranks; `build_experts` says where there are more

    def forward(self, rows: Rows, context: AnyContext = AS_TRAINED) -> torch.Tensor:
        """The weighted answers to rows of the shard's experts, one for each.

        `context`: of the pass; by default experts work as they were trained to.
        """
        return rows.weighted(self.answer(rows.gathered(), rows.counts_E, context))

    def answer(self, rows_RD: torch.Tensor, counts_E: torch.Tensor, context: AnyContext) -> torch.Tensor:
        """What a kind without a kernel of its own for `forward` defines: rows_RD sorted by expert, one answer each."""
        raise NotImplementedError

    def settle(self, standard_deviation: float) -> None:
        """After each weight was drawn by its name alone: make the weights of one expert fit each other."""


class ExpertFrame(nn.Module):
    """What a layer does to a token before its rows leave for the experts, and to the sum that comes back: nothing.

    It stands where the token is: with the attention half, not with the experts.
    """

    def enter(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD

    def leave(self, y_TD: torch.Tensor) -> torch.Tensor:
        return y_TD


class SwiGLUExperts(RoutedExperts):
    """down(silu(gate x) * up x). A prefix of the hidden units is an expert too (MatFormer, arXiv 2310.07707)."""

    PARTS = {"gate_up": ("gate_proj.weight", "up_proj.weight"), "down": ("down_proj.weight",)}

    def __init__(self, config: SwiGLUConfig, hidden_size: int, shard: Sequence[int]) -> None:
        super().__init__(shard)
        self.config = config
        self.gate_up = nn.Parameter(torch.empty(len(shard), 2 * config.hidden_size, hidden_size))
        self.down = nn.Parameter(torch.empty(len(shard), hidden_size, config.hidden_size))

    def forward(self, rows: Rows, context: AnyContext = AS_TRAINED) -> torch.Tensor:
        gate_up, down = self.gate_up, self.down
        width = self.config.width(context.width)
        if width != self.config.hidden_size:
            gate_EFD, up_EFD = gate_up.chunk(2, dim=1)
            gate_up = torch.cat([gate_EFD[:, :width], up_EFD[:, :width]], dim=1)
            down = down[:, :, :width].contiguous()
        return grouped_swiglu(rows.source_XD, rows.index_R, rows.counts_E, gate_up, down, rows.weights_R)


class MLPExperts(RoutedExperts):
    """down(act(up x)): DeepSpeed-MoE's and ModuleFormer's."""

    PARTS = {"up": ("up_proj.weight",), "down": ("down_proj.weight",)}

    def __init__(self, config: MLPConfig, hidden_size: int, shard: Sequence[int]) -> None:
        super().__init__(shard)
        self.activation = config.activation
        self.up = nn.Parameter(torch.empty(len(shard), config.hidden_size, hidden_size))
        self.down = nn.Parameter(torch.empty(len(shard), hidden_size, config.hidden_size))

    def answer(self, rows_RD: torch.Tensor, counts_E: torch.Tensor, context: AnyContext) -> torch.Tensor:
        inner_RF = activate(grouped_gemm(rows_RD, self.up, counts_E), self.activation)
        return grouped_gemm(inner_RF, self.down, counts_E)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of an `MLPConfig`."""
    if activation == "relu":
        return functional.relu(x)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class ZeroComputationExperts(nn.Module):
    """Zero, copy and constant experts (arXiv 2410.07348, section 3.1), evaluated where the token is."""

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.mix = nn.Parameter(torch.empty(config.constant_experts, 2, hidden_size))
        self.constant = nn.Parameter(torch.empty(config.constant_experts, hidden_size))

    def forward(self, x_TD: torch.Tensor, routing: Routing) -> ZeroComputation:
        """What `combine` needs to add their answers; nothing is computed yet."""
        ffn, copies = self.config.ffn_experts, self.config.copy_experts
        return ZeroComputation(x_TD, routing.experts_TK, ffn, self.mix, self.constant, copies)
