"""SwiGLU experts whose three matrices are products of two cheaper ones (StructuredFFN, arXiv 2406.16450).

A matrix W [M, N] becomes U S V, with r numbers between the factors and blocks on the diagonal of one or both:

    form            V [r, N]         S          U [M, r]         numbers
    low_rank        whole            -          whole            r (N + M)
    block_dense     B blocks         -          whole            r (N / B + M)
    block_shuffle   B blocks         shuffle    B blocks         r (N + M) / B        r = min(N, M)

The shuffle deals what each block of V made out over the blocks of U, as cards: the r numbers as [B, r / B], transposed.
A factor of B blocks is stored as its rows without their zeros: [r, N / B].

With `guided` (section 4 there) a whole matrix W of its own helps at first: alpha W x + (1 - alpha) U S V x, alpha
falling from 1 to 0 as a cosine over the first half of training. W starts as U S V, so at first it changes nothing.
Later, and wherever there is no training, W is not used, and gets no gradient.

The published code starts low-rank factors from a singular value decomposition of a whole random matrix. Here a tensor's
first values follow from the seed and its own name, so both factors are random, of a spread with which a product has the
variance that a whole matrix would give it.

Legend: R rows sorted by expert, E experts, N inputs and M outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from expertmesh.kernels.grouped_gemm import grouped_gemm
from expertmesh.system.model.context import AnyContext
from expertmesh.system.model.experts import RoutedExperts
from expertmesh.system.model.experts_config import StructuredConfig

MATRICES = ("gate", "up", "down")
GUIDED_SHARE = 0.5  # of training


class StructuredExperts(RoutedExperts):
    """down(silu(gate x) * up x) with each of the three in factors: `{matrix}_inner` is V, `{matrix}_outer` is U."""

    PARTS = {
        f"{matrix}_{part}": (f"{matrix}_proj.{part}.weight",)
        for matrix in MATRICES
        for part in ("inner", "outer", "guide")
    }

    def __init__(self, config: StructuredConfig, hidden_size: int, shard: Sequence[int]) -> None:
        super().__init__(shard)
        self.config = config
        experts = len(shard)
        for matrix in MATRICES:
            inputs, outputs = hidden_size, config.hidden_size
            if matrix == "down":
                inputs, outputs = outputs, inputs
            between = config.between(inputs, outputs)
            shapes = {
                "inner": (between, inputs // config.inner_blocks),
                "outer": (outputs, between // config.outer_blocks),
            }
            if config.guided:
                shapes["guide"] = (outputs, inputs)
            for part, shape in shapes.items():
                self.register_parameter(f"{matrix}_{part}", nn.Parameter(torch.empty(experts, *shape)))

    def answer(self, rows_RD: torch.Tensor, counts_E: torch.Tensor, context: AnyContext) -> torch.Tensor:
        guide = 0.0
        if self.config.guided and context.training is not None:
            guide = guidance(context.training.progress)
        gate_RF = self._multiply("gate", rows_RD, counts_E, guide)
        up_RF = self._multiply("up", rows_RD, counts_E, guide)
        return self._multiply("down", functional.silu(gate_RF) * up_RF, counts_E, guide)

    def merged(self, matrix: str) -> torch.Tensor:
        """[E, M, N]: the whole matrices that the factors of `matrix` stand for."""
        inputs = self.get_parameter(f"{matrix}_inner").shape[2] * self.config.inner_blocks
        experts = len(self.shard)
        columns_RN = torch.eye(inputs, device=self.gate_inner.device, dtype=self.gate_inner.dtype).repeat(experts, 1)
        counts_E = torch.full((experts,), inputs, device=columns_RN.device)
        return self._factored(matrix, columns_RN, counts_E).unflatten(0, (experts, inputs)).transpose(1, 2)

    @torch.no_grad()
    def settle(self, standard_deviation: float) -> None:
        blocks = self.config.inner_blocks * self.config.outer_blocks
        for matrix in MATRICES:
            inner, outer = (self.get_parameter(f"{matrix}_{part}") for part in ("inner", "outer"))
            # Each output sums r / B_outer terms of N / B_inner terms, where a whole matrix sums N.
            spread = math.sqrt(standard_deviation) * (blocks / inner.shape[1]) ** 0.25
            for factor in (inner, outer):
                factor *= spread / standard_deviation
            if self.config.guided:
                self.get_parameter(f"{matrix}_guide").copy_(self.merged(matrix))

    def _multiply(self, matrix: str, rows_RN: torch.Tensor, counts_E: torch.Tensor, guide: float) -> torch.Tensor:
        y_RM = self._factored(matrix, rows_RN, counts_E)
        if guide == 0:
            return y_RM
        guide_RM = grouped_gemm(rows_RN, getattr(self, f"{matrix}_guide"), counts_E)
        return guide * guide_RM + (1 - guide) * y_RM

    def _factored(self, matrix: str, rows_RN: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        # Not by `get_parameter`: those of copies of experts are no parameters.
        inner, outer = (getattr(self, f"{matrix}_{part}") for part in ("inner", "outer"))
        between_Rr = blocked_gemm(rows_RN, inner, counts_E, self.config.inner_blocks)
        return blocked_gemm(shuffle(between_Rr, self.config.outer_blocks), outer, counts_E, self.config.outer_blocks)


def blocked_gemm(rows_RN: torch.Tensor, weights_EMn: torch.Tensor, counts_E: torch.Tensor, blocks: int) -> torch.Tensor:
    """[R, M]: each row times its expert's matrix of `blocks` blocks on the diagonal, one grouped GEMM a block."""
    pairs = zip(rows_RN.chunk(blocks, dim=1), weights_EMn.chunk(blocks, dim=1), strict=True)
    return torch.cat([grouped_gemm(rows, weights, counts_E) for rows, weights in pairs], dim=1)


def shuffle(x_RM: torch.Tensor, blocks: int) -> torch.Tensor:
    """Number j of block b goes to place j * blocks + b: with as many or more in a block, each block to every one."""
    return x_RM.unflatten(1, (blocks, -1)).transpose(1, 2).flatten(1)


def guidance(progress: float) -> float:
    """The share of the whole matrix: a cosine from 1 at the start of training to 0 at its half, then 0."""
    return (1 + math.cos(math.pi * min(progress / GUIDED_SHARE, 1.0))) / 2
