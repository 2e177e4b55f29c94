"""The experts that cost almost nothing (MoE++, arXiv 2410.07348, section 3.1): zero, copy and constant.

They are evaluated where the token is and never take a row, so their slots cost no GEMM and no all-to-all:

    ids   0 .. E-1 | E .. E+C-1       | E+C .. E+C+P-1 | the rest
    kind  FFN      | constant         | copy (P)       | zero
    y     not here | a1*x + a2*v_i    | x              | 0          [a1, a2] = softmax(W_i x)

All of it is linear in x and the v_i once the mixing coefficients are known, so per token it comes down to one factor
for x and one for each v_i: y_TD = factor_T * x_TD + replace_TC @ constant_CD. Every token evaluates every W_i, chosen
or not: C is a handful and W_i has two rows, which is cheaper than selecting tokens, and no shape depends on the data.

Legend: T tokens, D model width, K experts per token, C constant experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ZeroComputation(NamedTuple):
    """What the zero-computation experts of a layer need to answer; see `zero_computation` for each."""

    x_TD: torch.Tensor
    experts_TK: torch.Tensor
    ffn_experts: int
    mix_C2D: torch.Tensor
    constant_CD: torch.Tensor
    copy_experts: int

    @property
    def answers(self) -> bool:
        """Whether any of them says something other than 0."""
        return self.copy_experts > 0 or len(self.constant_CD) > 0

    def answer(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """[T, D] by themselves."""
        return zero_computation(self.x_TD, self.experts_TK, weights_TK, *self[2:])


def zero_computation(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    ffn_experts: int,
    constant_mix_C2D: torch.Tensor,
    constant_CD: torch.Tensor,
    copy_experts: int,
) -> torch.Tensor:
    """Weighted sum of the zero, copy and constant experts' outputs, over the slots that chose one.

    Args:
        x_TD: [T, D] what the MoE layer receives, any float dtype.
        experts_TK: [T, K] int64 ids in the order FFN, constant, copy, zero.
        weights_TK: [T, K] float32 gate weights.
        ffn_experts: E, the number of FFN experts, whose slots add nothing here.
        constant_mix_C2D: [C, 2, D] W_i of the constant experts; C may be 0.
        constant_CD: [C, D] v_i of the constant experts.
        copy_experts: number of copy experts; every id past them is a zero expert.

    Returns:
        [T, D] in x's dtype, computed in float32 (float64 for float64); differentiable in x, the gate weights and both
        parameters. A zero expert adds nothing to the result nor to any gradient.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x, gates_TK = x_TD.to(wide), weights_TK.to(wide)
    constants = constant_CD.shape[0]
    first_copy = ffn_experts + constants

    is_copy_TK = (experts_TK >= first_copy) & (experts_TK < first_copy + copy_experts)
    constant_ids_C = torch.arange(ffn_experts, first_copy, device=experts_TK.device)
    chosen_TC = torch.where(experts_TK[:, :, None] == constant_ids_C, gates_TK[:, :, None], 0.0).sum(dim=1)

    mix_TC2 = torch.einsum("td,cmd->tcm", x, constant_mix_C2D.to(wide)).softmax(dim=-1)
    keep_TC, replace_TC = (chosen_TC[:, :, None] * mix_TC2).unbind(dim=-1)
    factor_T = torch.where(is_copy_TK, gates_TK, 0.0).sum(dim=1) + keep_TC.sum(dim=1)
    return (factor_T[:, None] * x + replace_TC @ constant_CD.to(wide)).to(x_TD.dtype)


def zero_computation_ref(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    ffn_experts: int,
    constant_mix_C2D: torch.Tensor,
    constant_CD: torch.Tensor,
    copy_experts: int,
) -> torch.Tensor:
    """The definition of `zero_computation`: every slot in turn, in the dtype of x, by plain autograd."""
    first_copy = ffn_experts + constant_CD.shape[0]
    outputs = [x_TD[:0]]
    for x_D, experts, weights_K in zip(x_TD, experts_TK.tolist(), weights_TK.to(x_TD.dtype), strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(experts, weights_K, strict=True):
            if ffn_experts <= expert < first_copy:
                keep, replace = (constant_mix_C2D[expert - ffn_experts] @ x_D).softmax(dim=0)
                y_D = y_D + weight * (keep * x_D + replace * constant_CD[expert - ffn_experts])
            elif first_copy <= expert < first_copy + copy_experts:
                y_D = y_D + weight * x_D
        outputs.append(y_D[None])
    return torch.cat(outputs)
