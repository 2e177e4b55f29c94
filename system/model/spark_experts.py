"""Experts of which each token wakes a few hidden units (Spark Transformer, arXiv 2506.06644).

    y = down( gelu(top_k(gate a)) * up b )        top_k: max(. - theta, 0), which keeps about `kept` of the F units

With a `predictor_width` r, a is the first r numbers of the token and b the others: gate and up together are as large as
one matrix, and gate, which says who is awake, is cheap (section 3 there). Without one both read the whole token, as in
Gemma 3n. GELU is the exact one. Every unit is computed here: those that sleep are zeros, and nothing is skipped.

Legend: R rows sorted by expert, D model width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from expertmesh.kernels.grouped_gemm import grouped_gemm
from expertmesh.kernels.statistical_top_k import statistical_top_k
from expertmesh.system.model.context import AnyContext
from expertmesh.system.model.experts import RoutedExperts
from expertmesh.system.model.experts_config import SparkConfig


class SparkExperts(RoutedExperts):
    """Gate, up and down of each expert; gate and up read the parts of a token that the config says."""

    PARTS = {"gate": ("gate_proj.weight",), "up": ("up_proj.weight",), "down": ("down_proj.weight",)}

    def __init__(self, config: SparkConfig, hidden_size: int, shard: Sequence[int]) -> None:
        super().__init__(shard)
        self.config = config
        predictor = hidden_size if config.predictor_width is None else config.predictor_width
        rest = hidden_size if config.predictor_width is None else hidden_size - predictor
        self.gate = nn.Parameter(torch.empty(len(shard), config.hidden_size, predictor))
        self.up = nn.Parameter(torch.empty(len(shard), config.hidden_size, rest))
        self.down = nn.Parameter(torch.empty(len(shard), hidden_size, config.hidden_size))

    def answer(self, rows_RD: torch.Tensor, counts_E: torch.Tensor, context: AnyContext) -> torch.Tensor:
        predictor, rest = self.gate.shape[2], self.up.shape[2]
        gate_RF = grouped_gemm(rows_RD[:, :predictor], self.gate, counts_E)
        up_RF = grouped_gemm(rows_RD[:, -rest:], self.up, counts_E)
        awake_RF = functional.gelu(statistical_top_k(gate_RF, self.config.kept))
        return grouped_gemm(awake_RF * up_RF, self.down, counts_E)
