"""Attention that breaks a stick: each query hands out a whole of 1, the nearest key first, and may keep a rest.

ModuleFormer (arXiv 2306.04640; `stickbreaking` of its released code): with l_ij = q_i k_j / sqrt(d) and b = sigmoid(l),

    a_ij = b_ij * prod over j < m <= i of (1 - b_im)         logits all 0:  1/2, 1/4, 1/8, ... from the nearest back

Nearer keys come first, so no positions are needed. Products of many factors below 1 vanish, so they are sums of logs.

Legend: B batch, H query heads, G key-value heads, S queries, C keys, d and e widths of keys and of values.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def stick_breaking(
    q_BHSd: torch.Tensor, k_BGCd: torch.Tensor, v_BGCe: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """o_BHSe in q's dtype, the weights in float32 (float64 for float64); differentiable.

    Args:
        q_BHSd, k_BGCd, v_BGCe: any float dtype; query head h reads key-value head h // (H / G).
        visible: bool, broadcastable to [B, H, S, C]. A key that a query does not see takes nothing of its stick.
    """
    repeat = q_BHSd.shape[1] // k_BGCd.shape[1]
    k_BHCd, v_BHCe = (t.repeat_interleave(repeat, dim=1) for t in (k_BGCd, v_BGCe))
    wide = torch.promote_types(q_BHSd.dtype, torch.float32)
    logits_BHSC = q_BHSd.to(wide) @ k_BHCd.to(wide).transpose(-1, -2) / math.sqrt(q_BHSd.shape[-1])
    kept_BHSC = torch.where(visible, functional.logsigmoid(-logits_BHSC), 0.0)  # log(1 - b)
    # What the nearer keys left. Summed without the key's own, not with it and less it again: one large logit is a large
    # number of this sum, and would cost the small ones their digits.
    left_BHSC = functional.pad(kept_BHSC[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    weights_BHSC = torch.where(visible, (functional.logsigmoid(logits_BHSC) + left_BHSC).exp(), 0.0)
    return (weights_BHSC @ v_BHCe.to(wide)).to(q_BHSd.dtype)


def stick_breaking_ref(
    q_BHSd: torch.Tensor, k_BGCd: torch.Tensor, v_BGCe: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """The definition of `stick_breaking`: one query at a time, from its nearest key back, in q's dtype."""
    batch, heads, queries, width = q_BHSd.shape
    keys, group = k_BGCd.shape[2], heads // k_BGCd.shape[1]
    visible = visible.expand(batch, heads, queries, keys)
    rows = [v_BGCe.new_zeros(0, v_BGCe.shape[-1])]
    for b, h, s in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, queries))).tolist():
        stick, answer_e = q_BHSd.new_ones(()), v_BGCe.new_zeros(v_BGCe.shape[-1])
        for j in reversed(range(keys)):
            if visible[b, h, s, j]:
                share = stick * (q_BHSd[b, h, s] @ k_BGCd[b, h // group, j] / width**0.5).sigmoid()
                answer_e = answer_e + share * v_BGCe[b, h // group, j]
                stick = stick - share
        rows.append(answer_e[None])
    return torch.cat(rows).view(batch, heads, queries, v_BGCe.shape[-1])
