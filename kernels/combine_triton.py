"""Combine as Triton kernels: each token gathers its rows, and answers for its zero-computation experts on the way.

One program a token holds the whole width in registers, so x is read once for all experts that need it, and a constant
expert's two dot products cost nothing to the tokens that did not choose it. With keep = sigmoid((W_0 - W_1) x), which
is the first of softmax(W x), and g the gradient of y:

    y       = sum over slots:   w * row | w * x | w * (keep x + (1 - keep) v) | 0         FFN | copy | constant | zero
    dw      =                   g.row   | g.x   | keep g.x + (1 - keep) g.v   | 0
    dx      = sum over slots:             w g   | w keep g + q (W_0 - W_1)             q = w keep (1 - keep) (g.x - g.v)
    dW_0    = sum over tokens q x = -dW_1                    dv = sum over tokens w (1 - keep) g

The backward writes q and w (1 - keep) for each token and constant expert, and a small matrix product sums over tokens.
No atomics: every number has one program that writes it.

Legend: T tokens, K slots a token, R rows, D width, E FFN experts, C constant experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from expertmesh.kernels.ops import operation
from expertmesh.kernels.tiles import Build, Chip, Tile
from expertmesh.kernels.zero_computation import ZeroComputation


@triton.jit
def _combine_kernel(
    rows_ptr,  # [R, D] any float dtype, contiguous
    row_of_slot_ptr,  # [T, K] int64, -1: none
    weights_ptr,  # [T, K] float32
    x_ptr,  # [T, D] dtype of rows, contiguous; this and what follows unused without ZERO
    experts_ptr,  # [T, K] int64
    mix_ptr,  # [C, 2, D] dtype of rows, contiguous
    constant_ptr,  # [C, D] dtype of rows, contiguous
    out_ptr,  # [T, D] dtype of rows, output
    D,
    E,
    C,
    COPIES,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGH: tl.constexpr,  # rows come without their weight
    ZERO: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of_slot_ptr + t * K + k)
        there = d < tl.where(row >= 0, D, 0)  # no branch: the loads of all slots are under way together
        value = tl.load(rows_ptr + tl.maximum(row, 0) * D + d, mask=there, other=0.0).to(tl.float32)
        if WEIGH:
            value *= tl.load(weights_ptr + t * K + k)
        acc += value
    if ZERO:
        x = tl.load(x_ptr + t * D + d, mask=inside, other=0.0).to(tl.float32)
        factor = 0.0
        for k in tl.static_range(K):
            weight = tl.load(weights_ptr + t * K + k)
            constant = tl.load(experts_ptr + t * K + k) - E
            if (constant >= C) & (constant < C + COPIES):
                factor += weight
            if (constant >= 0) & (constant < C):
                keep, _ = _keep(mix_ptr + constant * 2 * D, x, d, D)
                v = tl.load(constant_ptr + constant * D + d, mask=inside, other=0.0).to(tl.float32)
                factor += weight * keep
                acc += weight * (1 - keep) * v
        acc += factor * x
    tl.store(out_ptr + t * D + d, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _keep(mix_ptr, x, d, D):
    """The share of x that a constant expert keeps, and W_0 - W_1."""
    inside = d < D
    first = tl.load(mix_ptr + d, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(mix_ptr + D + d, mask=inside, other=0.0).to(tl.float32)
    difference = first - second
    return tl.sigmoid(tl.sum(difference * x, 0)), difference


@triton.jit
def _combine_backward_kernel(
    grad_ptr,  # [T, D] float dtype, contiguous
    rows_ptr,  # [R, D] dtype of grad; unused without WEIGH
    row_of_slot_ptr,  # [T, K] int64, -1: none
    weights_ptr,  # [T, K] float32
    x_ptr,  # [T, D] dtype of grad; this, experts, mix and constant unused without ZERO
    experts_ptr,  # [T, K] int64
    mix_ptr,  # [C, 2, D] dtype of grad
    constant_ptr,  # [C, D] dtype of grad
    grad_rows_ptr,  # [R, D] dtype of grad, output
    grad_weights_ptr,  # [T, K] float32, output
    grad_x_ptr,  # [T, D] dtype of grad, output; this and the next unused without ZERO
    shares_ptr,  # [T, C, 2] float32, output: q and w (1 - keep)
    D,
    E,
    C,
    COPIES,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGH: tl.constexpr,
    ZERO: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    grad = tl.load(grad_ptr + t * D + d, mask=inside, other=0.0).to(tl.float32)
    if ZERO:
        x = tl.load(x_ptr + t * D + d, mask=inside, other=0.0).to(tl.float32)
        grad_dot_x = tl.sum(grad * x, 0)
        grad_x = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for c in range(0, C):
            tl.store(shares_ptr + (t * C + c) * 2 + tl.arange(0, 2), tl.zeros((2,), dtype=tl.float32))
    for k in tl.static_range(K):
        row = tl.load(row_of_slot_ptr + t * K + k)
        there = d < tl.where(row >= 0, D, 0)
        at = tl.maximum(row, 0) * D + d
        weight = tl.load(weights_ptr + t * K + k)
        grad_weight = 0.0
        if WEIGH:
            value = tl.load(rows_ptr + at, mask=there, other=0.0).to(tl.float32)
            grad_weight = tl.sum(grad * value, 0)
            tl.store(grad_rows_ptr + at, (weight * grad).to(grad_rows_ptr.dtype.element_ty), mask=there)
        else:
            tl.store(grad_rows_ptr + at, grad.to(grad_rows_ptr.dtype.element_ty), mask=there)
        if ZERO:
            constant = tl.load(experts_ptr + t * K + k) - E
            if (constant >= C) & (constant < C + COPIES):
                grad_weight += grad_dot_x
                grad_x += weight * grad
            if (constant >= 0) & (constant < C):
                keep, difference = _keep(mix_ptr + constant * 2 * D, x, d, D)
                v = tl.load(constant_ptr + constant * D + d, mask=inside, other=0.0).to(tl.float32)
                grad_dot_v = tl.sum(grad * v, 0)
                grad_weight += keep * grad_dot_x + (1 - keep) * grad_dot_v
                q = weight * keep * (1 - keep) * (grad_dot_x - grad_dot_v)
                grad_x += weight * keep * grad + q * difference
                # A token's experts are distinct, so that no share is written over.
                tl.store(shares_ptr + (t * C + constant) * 2, q)
                tl.store(shares_ptr + (t * C + constant) * 2 + 1, weight * (1 - keep))
        tl.store(grad_weights_ptr + t * K + k, grad_weight)
    if ZERO:
        tl.store(grad_x_ptr + t * D + d, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


def _token_tile(width: int) -> Tile:
    """A whole row of `width`; 16 numbers a thread, in at most 16 warps."""
    columns = triton.next_power_of_2(max(width, 16))
    return Tile(1, columns, 1, max(1, min(16, columns // 512)), 3)


def _options(row_of_slot_TK, x_TD, constant_CD, width: int, ffn: int, copies: int, weigh: bool) -> dict[str, int]:
    """The kernels' sizes."""
    tile = _token_tile(width)
    return {
        **{"D": width, "E": ffn, "C": 0 if constant_CD is None else len(constant_CD), "COPIES": copies},
        **{"K": row_of_slot_TK.shape[1], "BLOCK_D": tile.columns, "WEIGH": weigh, "ZERO": x_TD is not None},
        "num_warps": tile.warps,
    }


def _fake_combine(rows_RD, row_of_slot_TK, weights_TK, x_TD, experts_TK, mix_C2D, constant_CD, ffn, copies, weigh):
    return rows_RD.new_empty(weights_TK.shape[0], rows_RD.shape[1])


@operation(
    "combine(Tensor rows, Tensor row_of_slot, Tensor weights, Tensor? x, Tensor? experts, Tensor? mix,"
    " Tensor? constant, int ffn, int copies, bool weigh) -> Tensor",
    _fake_combine,
)
def _combine(rows_RD, row_of_slot_TK, weights_TK, x_TD, experts_TK, mix_C2D, constant_CD, ffn, copies, weigh):
    tokens, D = len(weights_TK), rows_RD.shape[1]
    out_TD = rows_RD.new_empty(tokens, D)
    if tokens:
        _combine_kernel[(tokens,)](
            *(rows_RD, row_of_slot_TK, weights_TK, x_TD, experts_TK, mix_C2D, constant_CD, out_TD),
            **_options(row_of_slot_TK, x_TD, constant_CD, D, ffn, copies, weigh),
        )
    return out_TD


def _fake_combine_backward(
    grad_TD, rows, R, row_of_slot_TK, weights_TK, x_TD, experts_TK, mix_C2D, constant_CD, ffn, copies, weigh
):  # fmt: skip
    (T, D), C = grad_TD.shape, 0 if constant_CD is None else constant_CD.shape[0]
    zero = (T if x_TD is not None else 0, D), (T if x_TD is not None else 0, C, 2)
    return (
        *(grad_TD.new_empty(R, D), torch.empty_like(weights_TK), grad_TD.new_empty(zero[0])),
        weights_TK.new_empty(zero[1]),
    )


@operation(
    "combine_backward(Tensor grad, Tensor? rows, SymInt R, Tensor row_of_slot, Tensor weights, Tensor? x,"
    " Tensor? experts, Tensor? mix, Tensor? constant, int ffn, int copies, bool weigh)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_combine_backward,
)
def _combine_backward(grad_TD, rows_RD, R, row_of_slot_TK, weights_TK, x_TD, *rest):
    experts_TK, mix_C2D, constant_CD, ffn, copies, weigh = rest
    outputs = _fake_combine_backward(grad_TD, rows_RD, R, row_of_slot_TK, weights_TK, x_TD, *rest)
    if len(grad_TD):
        # Without the rows their part of the weights' gradient is not asked for: any rows do.
        values = outputs[0] if rows_RD is None else rows_RD
        _combine_backward_kernel[(len(grad_TD),)](
            *(grad_TD, values, row_of_slot_TK, weights_TK, x_TD, experts_TK, mix_C2D, constant_CD, *outputs),
            **_options(row_of_slot_TK, x_TD, constant_CD, grad_TD.shape[1], ffn, copies, weigh),
        )
    return outputs


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, weights_TK, x_TD, mix_C2D, constant_CD, row_of_slot_TK, experts_TK, ffn, copies, weigh):
        # The rows are needed for the weights' gradient only, and they are the largest tensor here.
        kept_RD = rows_RD if weigh and ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept_RD, row_of_slot_TK, weights_TK, x_TD, experts_TK, mix_C2D, constant_CD)
        ctx.rows, ctx.rest = len(rows_RD), (ffn, copies, weigh)
        return _combine(rows_RD, row_of_slot_TK, weights_TK, x_TD, experts_TK, mix_C2D, constant_CD, *ctx.rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        rows_RD, row_of_slot_TK, weights_TK, x_TD, *rest = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        grad_rows, grad_weights, grad_x, shares_TC2 = _combine_backward(
            grad_TD, rows_RD, ctx.rows, row_of_slot_TK, weights_TK, x_TD, *rest, *ctx.rest
        )
        if x_TD is None:
            return grad_rows, grad_weights, *[None] * 8
        # Rounded like the tokens that they multiply; sums over tokens are accumulated in float32.
        q_CT, replaced_CT = shares_TC2.to(grad_TD.dtype).permute(2, 1, 0)
        grad_first_CD = q_CT @ x_TD
        grad_mix, grad_constant = torch.stack([grad_first_CD, -grad_first_CD], dim=1), replaced_CT @ grad_TD
        return grad_rows, grad_weights, grad_x, grad_mix, grad_constant, *[None] * 5


def combine_triton(
    rows_RD: torch.Tensor,
    slots_R: torch.Tensor,
    weights_TK: torch.Tensor,
    weigh: bool = True,
    zero: ZeroComputation | None = None,
) -> torch.Tensor:
    """`combine_rows` by the Triton kernels whatever the device: on CPU tensors it needs TRITON_INTERPRET=1."""
    row_of_slot_TK = torch.full_like(weights_TK, -1, dtype=torch.int64)
    row_of_slot_TK.view(-1)[slots_R] = torch.arange(len(slots_R), device=slots_R.device)
    rows_RD, weights_TK = rows_RD.contiguous(), weights_TK.contiguous()
    if zero is None:
        return _Combine.apply(rows_RD, weights_TK, None, None, None, row_of_slot_TK, None, 0, 0, weigh)
    x_TD, mix_C2D, constant_CD = (t.contiguous() for t in (zero.x_TD, zero.mix_C2D, zero.constant_CD))
    rest = zero.experts_TK.contiguous(), zero.ffn_experts, zero.copy_experts, weigh
    return _Combine.apply(rows_RD, weights_TK, x_TD, mix_C2D, constant_CD, row_of_slot_TK, *rest)


def shipped(chip: Chip) -> list[Build]:
    """The kernels as a bfloat16 model of width 4096 runs them, with two choices a token and MoE++'s experts."""
    tile, bf16 = _token_tile(4096), "*bf16:16"
    arguments = {
        **dict.fromkeys(("rows_ptr", "x_ptr", "mix_ptr", "constant_ptr", "out_ptr", "grad_ptr"), bf16),
        **dict.fromkeys(("grad_rows_ptr", "grad_x_ptr"), bf16),
        **dict.fromkeys(("row_of_slot_ptr", "experts_ptr"), "*i64:16"),
        **dict.fromkeys(("weights_ptr", "grad_weights_ptr", "shares_ptr"), "*fp32:16"),
        **{"D": "i32:16", "E": "i32", "C": "i32", "COPIES": "i32", "K": 2, "BLOCK_D": tile.columns},
    }
    builds = []
    for name, kernel in (("combine", _combine_kernel), ("combine backward", _combine_backward_kernel)):
        for zero in (False, True):
            mine = {key: value for key, value in arguments.items() if key in kernel.arg_names}
            mine |= {"WEIGH": not zero, "ZERO": zero}
            builds.append(Build(f"{name}, zero-computation" if zero else name, kernel, mine, tile))
    return builds
