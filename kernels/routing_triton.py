"""The router's decision as one Triton kernel over the logits, with its gradient; routing.py says what it decides.

A program holds some tokens and all N experts in registers: what the gating residual adds, scores, the K best one after
the other (equal ones by the lowest id), their weights. The backward computes the scores again, from the logits alone;
with g the gradients of the weights w, 0 where an expert is not chosen,

    "paper", w = p = softmax(z):    dz = p (g - sum g p)
    "chosen", w = softmax of them:  dz = w (g - sum g w) at the chosen; a zero expert's w is 0, so it gets nothing
    "sigmoid", w = s / sum of s:    dz = s (1 - s) (g - sum g w) / (sum of the chosen s) at the chosen

and adds what the next layer's residual and the losses want of the complete logits. What that means for the residual's
own inputs are two products of matrices N wide, which the library does: dz @ map and dz transposed @ previous.

Legend: T tokens, N experts, K experts a token, G groups of experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from expertmesh.kernels.ops import operation
from expertmesh.kernels.tiles import Build, Chip, Tile

TINY = tl.constexpr(1e-20)  # keeps a sum of sigmoid scores that all rounded to 0 from dividing
LOWEST = tl.constexpr(-3.4028234663852886e38)  # what -inf counts as, so that only what is taken is below it

MAP_STEP = 16  # columns of the gating residual's map that are multiplied at a time
PAPER, CHOSEN, SIGMOID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def scores(z, inside, SIGMOID_SCORES: tl.constexpr):
    """(scores, their sum, their shares) of rows of logits; 0 outside. Softmax scores are shares themselves."""
    if SIGMOID_SCORES:
        s = tl.where(inside, tl.sigmoid(z), 0.0)
        total = tl.sum(s, 1) + TINY
    else:
        s = tl.where(inside, tl.exp(z - tl.max(tl.where(inside, z, LOWEST), 1)[:, None]), 0.0)
        total = tl.sum(s, 1)
        s = s / total[:, None]
        total = total * 0 + 1
    return s, total, s / total[:, None]


@triton.jit
def _open_groups(ranking, n, N, GROUPS: tl.constexpr, OPEN: tl.constexpr):
    """The experts of the OPEN groups whose two best add up to most."""
    size = N // GROUPS
    group = n // size
    sums = tl.zeros_like(ranking)
    for g in range(GROUPS):
        here = (group == g)[None, :]
        mine = tl.where(here, ranking, float("-inf"))
        best, at = tl.max(mine, 1, return_indices=True, return_indices_tie_break_left=True)
        second = tl.max(tl.where(n[None, :] == at[:, None], float("-inf"), mine), 1)
        sums = tl.where(here, (best + second)[:, None], sums)
    sums = tl.where((n < N)[None, :], sums, float("-inf"))
    is_open = tl.zeros_like(ranking) > 0
    for _ in range(OPEN):
        _, at = tl.max(
            tl.where(is_open, float("-inf"), sums), 1, return_indices=True, return_indices_tie_break_left=True
        )
        is_open = is_open | (group[None, :] == (at // size)[:, None])
    return is_open


@triton.jit
def _residual(previous_ptr, map_ptr, t, n, T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """previous @ map transposed, of some tokens, in full float32: a rounded logit sends a token elsewhere."""
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    m = tl.arange(0, BLOCK_M)
    for start in range(0, N, BLOCK_M):
        known = start + m < N
        a = tl.load(
            previous_ptr + t[:, None].to(tl.int64) * N + start + m[None, :],
            mask=(t < T)[:, None] & known[None, :],
            other=0.0,
        )
        b = tl.load(map_ptr + n[None, :] * N + start + m[:, None], mask=(n < N)[None, :] & known[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _route_kernel(
    logits_ptr,  # [T, N] float32, contiguous
    previous_ptr,  # [T, N] float32, contiguous: complete logits of the layer before; unused without RESIDUAL
    map_ptr,  # [N, N] float32, contiguous; unused without RESIDUAL
    ranking_ptr,  # [T, N] float32, contiguous: who is chosen goes by it; unused without RANKED
    bias_ptr,  # [N] float32, added to the scores for the choice; unused without BIASED
    experts_ptr,  # [T, K] int64, output
    weights_ptr,  # [T, K] float32, output
    complete_ptr,  # [T, N] float32, output: logits + previous @ map transposed; unused without RESIDUAL
    T,
    N,
    ZEROS,  # how many of the last experts are zero experts, in mode "released"
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MODE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RANKED: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    OPEN: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (t < T)[:, None] & (n < N)[None, :]
    at = t[:, None].to(tl.int64) * N + n[None, :]
    z = tl.load(logits_ptr + at, mask=inside, other=0.0)
    if RESIDUAL:
        z += _residual(previous_ptr, map_ptr, t, n, T, N, BLOCK_T, BLOCK_N, BLOCK_M)
        tl.store(complete_ptr + at, z, mask=inside)
    known = (n < N)[None, :] | (t < 0)[:, None]
    s = scores(z, known, MODE == SIGMOID)[0]

    if RANKED:
        ranking = tl.load(ranking_ptr + at, mask=inside, other=0.0)
    elif MODE == SIGMOID:
        ranking = s
        if BIASED:
            ranking += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    else:
        ranking = z  # not the shares: a softmax rounds different logits to one number
    if GROUPS > 1:
        ranking = tl.where(_open_groups(ranking, n, N, GROUPS, OPEN), ranking, float("-inf"))
    left = tl.where(known, tl.maximum(ranking, LOWEST), float("-inf"))

    chosen = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    values = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)  # score or logit of each choice
    value_of = z if MODE == CHOSEN else s
    for i in range(K):
        _, best = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        taken = n[None, :] == best[:, None]
        value = tl.sum(tl.where(taken, value_of, 0.0), 1)
        left = tl.where(taken, float("-inf"), left)
        chosen = tl.where(k[None, :] == i, best[:, None], chosen)
        values = tl.where(k[None, :] == i, value[:, None], values)
    is_slot = (k < K)[None, :]
    if MODE == CHOSEN:
        # Where all are zero experts none is hidden until after the softmax, which of nothing would be NaN.
        hidden = (chosen >= N - ZEROS) & is_slot
        all_hidden = tl.sum((hidden & is_slot).to(tl.int32), 1) == K
        counted = is_slot & ((hidden == 0) | all_hidden[:, None])
        highest = tl.max(tl.where(counted, values, LOWEST), 1)[:, None]
        e = tl.where(counted, tl.exp(tl.minimum(values - highest, 0.0)), 0.0)
        weights = tl.where(hidden, 0.0, e / tl.sum(e, 1)[:, None])
    elif MODE == SIGMOID:
        weights = values / (tl.sum(values, 1) + TINY)[:, None]
    else:
        weights = values
    out = t[:, None].to(tl.int64) * K + k[None, :]
    stored = (t < T)[:, None] & is_slot
    tl.store(experts_ptr + out, chosen.to(tl.int64), mask=stored)
    tl.store(weights_ptr + out, weights, mask=stored)


@triton.jit
def _route_backward_kernel(
    logits_ptr,  # [T, N] float32, complete
    experts_ptr,  # [T, K] int64
    weights_ptr,  # [T, K] float32
    grad_weights_ptr,  # [T, K] float32
    grad_complete_ptr,  # [T, N] float32: what others want of the complete logits; unused without RESIDUAL
    grad_ptr,  # [T, N] float32, output
    T,
    N,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MODE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    inside = (t < T)[:, None] & (n < N)[None, :]
    at = t[:, None].to(tl.int64) * N + n[None, :]
    z = tl.load(logits_ptr + at, mask=inside, other=0.0)
    known = (n < N)[None, :] | (t < 0)[:, None]
    s = scores(z, known, MODE == SIGMOID)[0]
    gradient = tl.zeros_like(z)  # these three are 0 where an expert is not chosen
    weight = tl.zeros_like(z)
    score = tl.zeros_like(z)
    weighted = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for k in range(K):
        slot = t.to(tl.int64) * K + k
        expert = tl.load(experts_ptr + slot, mask=t < T, other=0)
        w = tl.load(weights_ptr + slot, mask=t < T, other=0.0)
        g = tl.load(grad_weights_ptr + slot, mask=t < T, other=0.0)
        taken = n[None, :] == expert[:, None]
        weighted += g * w
        gradient = tl.where(taken, g[:, None], gradient)
        if MODE == CHOSEN:
            weight = tl.where(taken, w[:, None], weight)
        if MODE == SIGMOID:
            score = tl.where(taken, s, score)
    if MODE == PAPER:
        dz = s * (gradient - weighted[:, None])
    elif MODE == CHOSEN:
        dz = weight * (gradient - weighted[:, None])
    else:
        dz = score * (1 - score) * (gradient - weighted[:, None]) / (tl.sum(score, 1) + TINY)[:, None]
    if RESIDUAL:
        dz += tl.load(grad_complete_ptr + at, mask=inside, other=0.0)
    tl.store(grad_ptr + at, dz, mask=inside)


class Residual(NamedTuple):
    """What a gating residual adds to the logits: previous @ map transposed (MoE++, arXiv 2410.07348, equation 6)."""

    previous_TN: torch.Tensor
    """float32 complete logits of the MoE layer before."""
    map_NN: torch.Tensor
    """float32, learned."""


class Rule(NamedTuple):
    """How experts are chosen and weighted."""

    top_k: int
    mode: int
    zero_experts: int = 0
    groups: int = 1
    open_groups: int = 1


def logits_tile(experts: int) -> Tile:
    """Tokens and experts of a program: 2048 numbers, 16 a thread; with 32 the sigmoid's backward lacks registers."""
    columns = triton.next_power_of_2(max(experts, 2))
    return Tile(max(1, min(64, 2048 // columns)), columns, 1, 4, 3)


def _fake_route(logits_TN, previous_TN, map_NN, ranking_TN, bias_N, top_k, mode, zero_experts, groups, open_groups):
    T = logits_TN.shape[0]
    complete = torch.empty_like(logits_TN) if previous_TN is not None else logits_TN.new_empty(0)
    return logits_TN.new_empty(T, top_k, dtype=torch.int64), logits_TN.new_empty(T, top_k), complete


@operation(
    "route(Tensor logits, Tensor? previous, Tensor? map, Tensor? ranking, Tensor? bias, int top_k, int mode,"
    " int zero_experts, int groups, int open_groups) -> (Tensor, Tensor, Tensor)",
    _fake_route,
)
def _route(logits_TN, previous_TN, map_NN, ranking_TN, bias_N, top_k, mode, zero_experts, groups, open_groups):
    """Experts, weights and, where there is a residual, the complete logits; else nothing of them."""
    (T, N), tile = logits_TN.shape, logits_tile(logits_TN.shape[1])
    tensors = logits_TN, previous_TN, map_NN, ranking_TN, bias_N
    outputs = _fake_route(*tensors, top_k, mode, zero_experts, groups, open_groups)
    if T:
        _route_kernel[(triton.cdiv(T, tile.rows),)](
            *(*tensors, *outputs, T, N, zero_experts),
            K=top_k,
            BLOCK_K=triton.next_power_of_2(top_k),
            BLOCK_T=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_M=MAP_STEP,
            MODE=mode,
            RESIDUAL=previous_TN is not None,
            RANKED=ranking_TN is not None,
            BIASED=bias_N is not None,
            GROUPS=groups,
            OPEN=open_groups,
            num_warps=tile.warps,
        )
    return outputs


@operation(
    "route_backward(Tensor logits, Tensor experts, Tensor weights, Tensor grad_weights, Tensor? grad_complete,"
    " int mode) -> Tensor",
    lambda logits_TN, *_: torch.empty_like(logits_TN),
)
def _route_backward(logits_TN, experts_TK, weights_TK, grad_weights_TK, grad_complete_TN, mode):
    (T, N), tile = logits_TN.shape, logits_tile(logits_TN.shape[1])
    grad_TN = torch.empty_like(logits_TN)
    if T:
        _route_backward_kernel[(triton.cdiv(T, tile.rows),)](
            *(logits_TN, experts_TK, weights_TK, grad_weights_TK, grad_complete_TN, grad_TN, T, N),
            K=experts_TK.shape[1],
            BLOCK_T=tile.rows,
            BLOCK_N=tile.columns,
            MODE=mode,
            RESIDUAL=grad_complete_TN is not None,
            num_warps=tile.warps,
        )
    return grad_TN


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TN, previous_TN, map_NN, ranking_TN, bias_N, rule):
        experts_TK, weights_TK, complete_TN = _route(logits_TN, previous_TN, map_NN, ranking_TN, bias_N, *rule)
        ctx.mark_non_differentiable(experts_TK)
        ctx.set_materialize_grads(False)
        handed_on = logits_TN if previous_TN is None else complete_TN
        ctx.save_for_backward(previous_TN, map_NN, handed_on, experts_TK, weights_TK)
        ctx.mode = rule.mode
        return experts_TK, weights_TK, complete_TN

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_weights_TK, grad_complete_TN):
        previous_TN, map_NN, *saved = ctx.saved_tensors
        grad_TN = grad_complete_TN if previous_TN is not None else None
        if grad_weights_TK is not None:
            grad_TN = None if grad_TN is None else grad_TN.contiguous()
            grad_TN = _route_backward(*saved, grad_weights_TK.contiguous(), grad_TN, ctx.mode)
        if previous_TN is None or grad_TN is None:
            return grad_TN, None, None, None, None, None
        return grad_TN, grad_TN @ map_NN, grad_TN.T @ previous_TN, None, None, None


def route_triton(
    logits_TN: torch.Tensor,
    rule: Rule,
    residual: Residual | None = None,
    ranking_TN: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(experts_TK, weights_TK, complete logits) of float32 logits; on CPU tensors it needs TRITON_INTERPRET=1."""
    if ranking_TN is not None:
        ranking_TN = ranking_TN.detach().float().contiguous()
    added = (None, None) if residual is None else (t.float().contiguous() for t in residual)
    experts_TK, weights_TK, complete_TN = _Route.apply(logits_TN.contiguous(), *added, ranking_TN, bias_N, rule)
    return experts_TK, weights_TK, logits_TN if residual is None else complete_TN


def shipped(chip: Chip) -> list[Build]:
    """The kernels at 64 experts, two choices a token, and at 256 in 8 groups, eight choices (DeepSeek-V3)."""
    floats = ("logits_ptr", "previous_ptr", "map_ptr", "ranking_ptr", "bias_ptr", "weights_ptr", "complete_ptr")
    pointers = dict.fromkeys((*floats, "grad_weights_ptr", "grad_complete_ptr", "grad_ptr"), "*fp32:16")
    pointers |= {"experts_ptr": "*i64:16"}
    sizes = {"T": "i32:16", "N": "i32:16", "ZEROS": "i32"}
    builds = []
    for experts, top_k, mode, groups in ((64, 2, 0, 1), (64, 2, 1, 1), (256, 8, 2, 8)):
        tile = logits_tile(experts)
        blocks = {"K": top_k, "BLOCK_K": top_k, "BLOCK_T": tile.rows, "BLOCK_N": tile.columns, "BLOCK_M": MAP_STEP}
        blocks |= {"MODE": mode, "RANKED": False, "BIASED": mode == 2, "GROUPS": groups, "OPEN": max(1, groups // 2)}
        for residual in (False, True):
            for name, kernel in (("route", _route_kernel), ("route backward", _route_backward_kernel)):
                everything = pointers | sizes | blocks | {"RESIDUAL": residual}
                arguments = {key: everything[key] for key in kernel.arg_names}
                name += ", residual" if residual else ""
                builds.append(Build(f"{name}, {('paper', 'chosen', 'sigmoid')[mode]}", kernel, arguments, tile))
    return builds
