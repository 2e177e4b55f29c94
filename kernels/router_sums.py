"""All that the losses need of a router's logits, in one pass over them: sums over tokens, and the loads.

Each loss is then a few numbers of N. With P = probability sums / T, f = counts / T:

    heterogeneous (arXiv 2410.07348, equation 7)     sum eta f P                          balance_loss.py
    Switch (2101.03961, 4), GShard (2006.16668)      N sum f P / K,  N sum f_first P      balance_loss.py
    mutual information (2306.04640, released code)   sum P log P - information / T        mutual_information.py
    z (ST-MoE, 2202.08906, equation 5)               squared log-sum-exp / T: it keeps logits small, where float
                                                     arithmetic tells them apart and a softmax does not saturate

Separate operations read T*N numbers several times each and keep as many for the backward. Here the logits are read once
forward and once backward, and nothing but them is kept: with p the probabilities, g_n, g_z, g_i the gradients of the
sums,

    softmax:  dz_n = p_n (g_n + g_i log p_n - sum_m p_m (g_m + g_i log p_m)) + 2 g_z lse p_n

Sums over tokens run in a fixed order: a part for each tile of tokens, and then the parts; no atomics.

Legend: T tokens, N experts of every kind, K experts a token, B tiles of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from expertmesh.kernels.device import by_triton
from expertmesh.kernels.ops import operation
from expertmesh.kernels.routing import TINY, expert_counts
from expertmesh.kernels.routing_triton import logits_tile, scores
from expertmesh.kernels.tiles import Build, Chip

SMALLEST = tl.constexpr(1e-30)  # keeps log p finite where p rounded to 0


class RouterSums(NamedTuple):
    """Over the tokens of this rank."""

    probabilities_N: torch.Tensor
    """float32, of each expert."""
    z: torch.Tensor
    """float32 scalar: of the squared log-sum-exp of the logits."""
    information: torch.Tensor
    """float32 scalar: of sum_n p_n log p_n, minus the router's entropy."""
    counts_N: torch.Tensor
    """int64 slots that chose each expert."""
    firsts_N: torch.Tensor
    """int64 tokens whose first choice it was."""
    tokens: int
    """T, how many they are over."""

    @property
    def means_N(self) -> torch.Tensor:
        """float32 mean probability of each expert; 0, with a gradient of 0, where there are no tokens. So are these:"""
        return self.probabilities_N / max(self.tokens, 1)

    @property
    def z_loss(self) -> torch.Tensor:
        """float32 scalar, the mean over tokens of the squared log-sum-exp."""
        return self.z / max(self.tokens, 1)

    @property
    def entropy(self) -> torch.Tensor:
        """float32 scalar, mean over tokens, in nats: log N where the router cannot tell experts apart, 0 where sure."""
        return -self.information / max(self.tokens, 1)


@triton.jit
def _log_sum_exp(z, known):
    highest = tl.max(tl.where(known, z, float("-inf")), 1)
    return highest + tl.log(tl.sum(tl.where(known, tl.exp(z - highest[:, None]), 0.0), 1))


@triton.jit
def _sums_kernel(
    logits_ptr,  # [T, N] float32, contiguous
    chosen_ptr,  # [T, K] int64
    probabilities_ptr,  # [B, N] float32, output
    scalars_ptr,  # [B, 2] float32, output: z, information
    counts_ptr,  # [B, 2, N] int32, output: all choices, first ones
    T,
    N,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    b = tl.program_id(0)
    t = b * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    inside = (t < T)[:, None] & (n < N)[None, :]
    known = (n < N)[None, :] | (t < 0)[:, None]
    z = tl.load(logits_ptr + t[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0.0)
    _, _, p = scores(z, known, SIGMOID)
    p = tl.where(inside, p, 0.0)
    tl.store(probabilities_ptr + b * N + n, tl.sum(p, 0), mask=n < N)
    lse = tl.where(t < T, _log_sum_exp(z, known), 0.0)
    tl.store(scalars_ptr + b * 2, tl.sum(lse * lse, 0))
    tl.store(scalars_ptr + b * 2 + 1, tl.sum(tl.sum(p * tl.log(tl.maximum(p, SMALLEST)), 1), 0))
    counts = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for k in range(K):
        expert = tl.load(chosen_ptr + t.to(tl.int64) * K + k, mask=t < T, other=-1)
        counts += tl.sum((expert[:, None] == n[None, :]).to(tl.int32), 0)
        if k == 0:
            tl.store(counts_ptr + (b * 2 + 1) * N + n, counts, mask=n < N)
    tl.store(counts_ptr + b * 2 * N + n, counts, mask=n < N)


@triton.jit
def _sums_backward_kernel(
    logits_ptr,  # [T, N] float32
    grad_probabilities_ptr,  # [N] float32
    grad_scalars_ptr,  # [2] float32: of z, of information
    grad_ptr,  # [T, N] float32, output
    T,
    N,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.arange(0, BLOCK_N)
    inside = (t < T)[:, None] & (n < N)[None, :]
    known = (n < N)[None, :] | (t < 0)[:, None]
    at = t[:, None].to(tl.int64) * N + n[None, :]
    z = tl.load(logits_ptr + at, mask=inside, other=0.0)
    s, total, p = scores(z, known, SIGMOID)
    grad_z = tl.load(grad_scalars_ptr)
    grad_information = tl.load(grad_scalars_ptr + 1)
    grad_p = tl.load(grad_probabilities_ptr + n, mask=n < N, other=0.0)[None, :]
    grad_p = grad_p + grad_information * (tl.log(tl.maximum(p, SMALLEST)) + 1)
    dz = s * (grad_p - tl.sum(p * grad_p, 1)[:, None]) / total[:, None]
    if SIGMOID:
        dz *= 1 - s
    lse = _log_sum_exp(z, known)
    dz += 2 * grad_z * lse[:, None] * tl.exp(z - lse[:, None])
    tl.store(grad_ptr + at, dz, mask=inside)


def _fake_sums(logits_TN, chosen_TK, sigmoid):
    tiles, N = triton.cdiv(logits_TN.shape[0], logits_tile(logits_TN.shape[1]).rows), logits_TN.shape[1]
    counts_B2N = logits_TN.new_empty(tiles, 2, N, dtype=torch.int32)
    return logits_TN.new_empty(tiles, N), logits_TN.new_empty(tiles, 2), counts_B2N


@operation("router_sums(Tensor logits, Tensor chosen, bool sigmoid) -> (Tensor, Tensor, Tensor)", _fake_sums)
def _sums(logits_TN, chosen_TK, sigmoid):
    """The parts of each tile of tokens: of the probabilities, of z and information, of all and of first choices."""
    (T, N), tile = logits_TN.shape, logits_tile(logits_TN.shape[1])
    outputs = _fake_sums(logits_TN, chosen_TK, sigmoid)
    if T:
        _sums_kernel[(len(outputs[0]),)](
            *(logits_TN, chosen_TK, *outputs, T, N),
            K=chosen_TK.shape[1],
            BLOCK_T=tile.rows,
            BLOCK_N=tile.columns,
            SIGMOID=sigmoid,
            num_warps=tile.warps,
        )
    return outputs


@operation(
    "router_sums_backward(Tensor logits, Tensor grad_probabilities, Tensor grad_scalars, bool sigmoid) -> Tensor",
    lambda logits_TN, *_: torch.empty_like(logits_TN),
)
def _sums_backward(logits_TN, grad_probabilities_N, grad_scalars_2, sigmoid):
    (T, N), tile = logits_TN.shape, logits_tile(logits_TN.shape[1])
    grad_TN = torch.empty_like(logits_TN)
    if T:
        _sums_backward_kernel[(triton.cdiv(T, tile.rows),)](
            *(logits_TN, grad_probabilities_N, grad_scalars_2, grad_TN, T, N),
            BLOCK_T=tile.rows,
            BLOCK_N=tile.columns,
            SIGMOID=sigmoid,
            num_warps=tile.warps,
        )
    return grad_TN


class _RouterSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TN, chosen_TK, sigmoid):
        probabilities_BN, scalars_B2, counts_B2N = _sums(logits_TN, chosen_TK, sigmoid)
        z, information = scalars_B2.sum(0).unbind()
        counts_N, firsts_N = (counts.clone() for counts in counts_B2N.sum(0).unbind())
        ctx.mark_non_differentiable(counts_N, firsts_N)
        ctx.save_for_backward(logits_TN)
        ctx.sigmoid = sigmoid
        return probabilities_BN.sum(0), z.clone(), information.clone(), counts_N, firsts_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_probabilities_N, grad_z, grad_information, *_):
        grads = grad_probabilities_N.contiguous(), torch.stack([grad_z, grad_information])
        return _sums_backward(*ctx.saved_tensors, *grads, ctx.sigmoid), None, None


def router_sums(logits_TN: torch.Tensor, chosen_TK: torch.Tensor, sigmoid: bool = False) -> RouterSums:
    """The sums of one layer's tokens; those of float32 are differentiable in the logits.

    Args:
        logits_TN: [T, N] float32 (torch's operations also take float64), such as `Routing.scores_TN`.
        chosen_TK: [T, K] int64 ids in [0, N); the first column holds the first choices.
        sigmoid: probabilities are sigmoid scores divided by their sum, not a softmax (`route_sigmoid`).
    """
    if by_triton(logits_TN):
        p_N, z, information, counts_N, firsts_N = _RouterSums.apply(
            logits_TN.contiguous(), chosen_TK.contiguous(), sigmoid
        )
        return RouterSums(p_N, z, information, counts_N, firsts_N, len(logits_TN))
    return router_sums_ref(logits_TN, chosen_TK, sigmoid)


def router_sums_ref(logits_TN: torch.Tensor, chosen_TK: torch.Tensor, sigmoid: bool = False) -> RouterSums:
    """The definition of `router_sums`, and what runs where Triton does not; by plain autograd."""
    if sigmoid:
        scores_TN = logits_TN.sigmoid()
        p_TN = scores_TN / (scores_TN.sum(-1, keepdim=True) + TINY)
    else:
        p_TN = logits_TN.softmax(-1)
    return RouterSums(
        probabilities_N=p_TN.sum(0),
        z=logits_TN.logsumexp(-1).square().sum(),
        information=(p_TN * p_TN.clamp(min=SMALLEST.value).log()).sum(),
        counts_N=expert_counts(chosen_TK, logits_TN.shape[1]),
        firsts_N=expert_counts(chosen_TK[:, :1], logits_TN.shape[1]),
        tokens=len(logits_TN),
    )


def shipped(chip: Chip) -> list[Build]:
    """The kernels at 64 experts and two choices a token."""
    tile = logits_tile(64)
    names = ("logits_ptr", "probabilities_ptr", "scalars_ptr", "grad_probabilities_ptr", "grad_scalars_ptr", "grad_ptr")
    everything: dict[str, Any] = dict.fromkeys(names, "*fp32:16") | {"chosen_ptr": "*i64:16", "counts_ptr": "*i32:16"}
    everything |= {
        "T": "i32:16",
        "N": "i32:16",
        "K": 2,
        "BLOCK_T": tile.rows,
        "BLOCK_N": tile.columns,
        "SIGMOID": False,
    }
    kernels = (("router sums", _sums_kernel), ("router sums backward", _sums_backward_kernel))
    return [Build(name, fn, {key: everything[key] for key in fn.arg_names}, tile) for name, fn in kernels]
