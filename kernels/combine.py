"""From the experts' rows back to tokens: each token gets the weighted sum of its own, and of what it did not send away.

A row serves one slot t*K+k (`slots_R`, see `routing.sort_slots`), so its token is slot // K. Slots of zero-computation
experts have no row, so a token has from 0 to K of them:

    slots_R = [1, 2, 5, 4, 0]    K = 2        by slot: token 0 has rows 4 and 0, token 1 row 1, token 2 rows 3 and 2

Summing into tokens is done by gathering, never by scattering: each token adds its own rows in order of k, which needs
no atomics and gives the same bits on every run. On CUDA that is a Triton kernel (combine_triton.py), which answers for
the zero-computation experts too; elsewhere `embedding_bag`, a gather for ragged bags.

Legend: T tokens, D model width, K slots per token, R rows.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from expertmesh.kernels.combine_triton import combine_triton
from expertmesh.kernels.device import by_triton
from expertmesh.kernels.zero_computation import ZeroComputation, zero_computation_ref


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _sum_into_tokens(
    rows_RD: torch.Tensor, slots_R: torch.Tensor, weights_R: torch.Tensor | None, tokens: int, top_k: int
) -> torch.Tensor:
    """[T, D] for each token the (weighted) sum of its rows, in their dtype (the weighted one in float32 at least)."""
    slots, device = tokens * top_k, slots_R.device
    row_of_slot = slots_R.new_full((slots,), -1).scatter_(0, slots_R, torch.arange(len(slots_R), device=device))
    if len(slots_R) == slots:
        order, offsets_T = row_of_slot, torch.arange(0, slots, top_k, device=device)
    else:
        has_row = row_of_slot >= 0
        order = row_of_slot[has_row]
        ends_T = has_row.view(tokens, top_k).sum(1).cumsum(0)
        offsets_T = functional.pad(ends_T[:-1], (1, 0))
    if weights_R is not None:
        rows_RD = rows_RD * weights_R.to(_wide(rows_RD.dtype))[:, None]  # products and sum in float32
    return functional.embedding_bag(order, rows_RD, offsets_T, mode="sum")


def _combine(rows_RD: torch.Tensor, slots_R: torch.Tensor, weights_TK: torch.Tensor, weigh: bool) -> torch.Tensor:
    weights_R = weights_TK.flatten()[slots_R] if weigh else None
    return _sum_into_tokens(rows_RD, slots_R, weights_R, *weights_TK.shape).to(rows_RD.dtype)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, slots_R, weights_TK, weigh):
        # The rows are needed for the weights' gradient only, and they are the largest tensor here.
        ctx.save_for_backward(rows_RD if weigh and ctx.needs_input_grad[2] else None, slots_R, weights_TK)
        ctx.rows_dtype, ctx.weigh = rows_RD.dtype, weigh
        return _combine(rows_RD, slots_R, weights_TK, weigh)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        rows_RD, slots_R, weights_TK = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, slots_R // weights_TK.shape[1])
        if not ctx.weigh:
            return grad_RD, None, None, None
        wide = _wide(ctx.rows_dtype)
        grad_RD = grad_RD.to(wide)
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[2]:
            dots_R = (grad_RD * rows_RD).sum(dim=-1).to(weights_TK.dtype)
            # A slot has at most one row, so no two writes meet; slots without a row keep the 0.
            grad_weights = torch.zeros_like(weights_TK).flatten().index_copy_(0, slots_R, dots_R).view_as(weights_TK)
        if ctx.needs_input_grad[0]:
            grad_rows = (grad_RD * weights_TK.flatten()[slots_R, None].to(wide)).to(ctx.rows_dtype)
        return grad_rows, None, grad_weights, None


def combine_rows(
    rows_RD: torch.Tensor,
    slots_R: torch.Tensor,
    weights_TK: torch.Tensor,
    weigh: bool = True,
    zero: ZeroComputation | None = None,
) -> torch.Tensor:
    """Add the rows up per token: y[t] = sum over the rows r of token t of weights[slot of r] * rows[r].

    Args:
        rows_RD: [R, D] expert outputs, any float dtype.
        slots_R: [R] int64 distinct slots in [0, T * K), in any order.
        weights_TK: [T, K] float32 gate weights; those of slots without a row get gradient 0, unless `zero` uses them.
        weigh: False where the rows have been multiplied with their weights already.
        zero: adds what the zero-computation experts of these tokens answer; on CUDA in the same kernel.

    Returns:
        [T, D] in the rows' dtype, accumulated in float32 (float64 for float64); differentiable in rows and weights, and
        in the tokens and parameters of `zero`.
    """
    if by_triton(rows_RD):
        return combine_triton(rows_RD, slots_R, weights_TK, weigh, zero)
    combine = _CombineRows.apply if torch.is_grad_enabled() else _combine
    y_TD = combine(rows_RD, slots_R, weights_TK, weigh)
    return y_TD + zero.answer(weights_TK) if zero is not None and zero.answers else y_TD


def combine_rows_ref(
    rows_RD: torch.Tensor,
    slots_R: torch.Tensor,
    weights_TK: torch.Tensor,
    weigh: bool = True,
    zero: ZeroComputation | None = None,
) -> torch.Tensor:
    """The definition of `combine_rows`, by plain autograd in the rows' dtype."""
    tokens, top_k = weights_TK.shape
    y_TD = rows_RD.new_zeros(tokens, rows_RD.shape[1])
    for row_D, slot in zip(rows_RD, slots_R.tolist(), strict=True):
        weight = weights_TK[slot // top_k, slot % top_k].to(rows_RD.dtype) if weigh else 1
        y_TD = y_TD.index_add(0, slots_R.new_tensor([slot // top_k]), (weight * row_D)[None])
    if zero is not None:
        y_TD = y_TD + zero_computation_ref(zero.x_TD, zero.experts_TK, weights_TK, *zero[2:])
    return y_TD
