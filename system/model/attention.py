"""Grouped-query attention with rotary positions.

The layer makes queries, keys and values; *what a query may look at* is the caller's: `CausalAttend` for whole training
sequences, the serving engine's cache for requests of any length. So both run this one layer.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from expertmesh.system.model.config import AttentionConfig


class Attend(Protocol):
    """Answers each query from the keys and values it may see."""

    def __call__(self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor) -> torch.Tensor:
        """Return o_THd. T tokens, H query heads, G key-value heads, d head width."""
        ...


class CausalAttend:
    """T tokens are sequences of one length, one after the other; a token sees itself and what came before."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def __call__(self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor) -> torch.Tensor:
        q_BHSd, k_BGSd, v_BGSd = (
            t.unflatten(0, (-1, self.sequence_length)).transpose(1, 2) for t in (q_THd, k_TGd, v_TGd)
        )
        o_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BGSd, v_BGSd, is_causal=True, enable_gqa=True)
        return o_BHSd.transpose(1, 2).flatten(0, 1)


def rotate(x_THd: torch.Tensor, positions_T: torch.Tensor, theta: float) -> torch.Tensor:
    """Turn each pair (i, i + d/2) of a head by position * theta^(-2i/d) (RoFormer, arXiv 2104.09864, section 3.4.2)."""
    half = x_THd.shape[-1] // 2
    exponents = torch.arange(half, device=x_THd.device, dtype=torch.float32) / half
    angles_Th = positions_T[:, None].float() * theta**-exponents
    cos_T1h, sin_T1h = angles_Th.cos()[:, None], angles_Th.sin()[:, None]
    first_THh, second_THh = x_THd.float().chunk(2, dim=-1)
    turned = (first_THh * cos_T1h - second_THh * sin_T1h, second_THh * cos_T1h + first_THh * sin_T1h)
    return torch.cat(turned, dim=-1).type_as(x_THd)


class Attention(nn.Module):
    """q, k, v and output projections without biases; names as Hugging Face's Llama family has them."""

    def __init__(self, config: AttentionConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.q_proj = nn.Linear(hidden_size, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor, positions_T: torch.Tensor, attend: Attend) -> torch.Tensor:
        split = (-1, self.config.head_dim)
        q_THd, k_TGd, v_TGd = (p(x_TD).unflatten(-1, split) for p in (self.q_proj, self.k_proj, self.v_proj))
        q_THd = rotate(q_THd, positions_T, self.config.rope_theta)
        k_TGd = rotate(k_TGd, positions_T, self.config.rope_theta)
        return self.o_proj(attend(self.layer, q_THd, k_TGd, v_TGd).flatten(1))
