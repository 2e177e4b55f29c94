"""Experts that share their features and differ in how they scale and shift them (MoFME, arXiv 2312.16610).

    h   = gelu(W_a x) * W_b x                                 of a token, once, before it is dispatched
    E_e = scale_e(h) * h + shift_e(h)                         scale_e, shift_e: linear maps with biases
    y   = adaptor( sum over chosen e of w_e E_e )             adaptor: linear, gelu, linear, with biases

So h travels to the experts, and what they answer comes back before the adaptor: the frame around dispatch and combine.
Zero-computation experts, where a layer has some, stand inside it as the others do: a copy is one of h. A shared expert
stands outside: it reads x and is added after the adaptor.

The paper's uncertainty-aware router is left out: the code that was published for it does not run. Any router of this
project chooses among these experts.

Legend: T tokens, R rows sorted by expert, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from expertmesh.kernels.grouped_gemm import grouped_gemm
from expertmesh.system.model.context import AnyContext
from expertmesh.system.model.experts import ExpertFrame, RoutedExperts
from expertmesh.system.model.experts_config import ModulatedConfig


class ModulatedExperts(RoutedExperts):
    """scale(h) * h + shift(h): both maps are one matrix of an expert here, and two in a checkpoint."""

    PARTS = {"weight": ("scale.weight", "shift.weight"), "bias": ("scale.bias", "shift.bias")}

    def __init__(self, hidden_size: int, shard: Sequence[int]) -> None:
        super().__init__(shard)
        self.weight = nn.Parameter(torch.empty(len(shard), 2 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(len(shard), 2 * hidden_size))

    def answer(self, rows_RD: torch.Tensor, counts_E: torch.Tensor, context: AnyContext) -> torch.Tensor:
        bias_R2D = self.bias.repeat_interleave(counts_E, dim=0, output_size=len(rows_RD))
        scale_RD, shift_RD = (grouped_gemm(rows_RD, self.weight, counts_E) + bias_R2D).chunk(2, dim=1)
        return scale_RD * rows_RD + shift_RD


class ModulatedFrame(ExpertFrame):
    """The features before dispatch, the adaptor after combine."""

    def __init__(self, config: ModulatedConfig, hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, hidden_size, bias=False)  # W_a
        self.up_proj = nn.Linear(hidden_size, hidden_size, bias=False)  # W_b
        self.adaptor_in = nn.Linear(hidden_size, config.adaptor_size)
        self.adaptor_out = nn.Linear(config.adaptor_size, hidden_size)

    def enter(self, x_TD: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.gate_proj(x_TD)) * self.up_proj(x_TD)

    def leave(self, y_TD: torch.Tensor) -> torch.Tensor:
        return self.adaptor_out(functional.gelu(self.adaptor_in(y_TD)))
