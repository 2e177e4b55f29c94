"""Attention with rotary positions: grouped queries, or latent keys and values.

A layer makes queries, keys and values; *what a query may look at* is the caller's: `CausalAttend` for whole training
sequences, the serving engine's cache for requests of any length. So both run the same layers.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from expertmesh.system.model.config import AnyAttention, AttentionConfig, MLAConfig


class Attend(Protocol):
    """Answers each query from the keys and values it may see."""

    def __call__(
        self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGe: torch.Tensor, window: int | None = None
    ) -> torch.Tensor:
        """Return o_THe. T tokens, H query heads, G key-value heads, d and e widths of keys and of values.

        `window`: a token sees that many tokens back, itself included; None: all.
        """
        ...


class CausalAttend:
    """T tokens are sequences of one length, one after the other; a token sees itself and what came before."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def __call__(
        self, layer: int, q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGe: torch.Tensor, window: int | None = None
    ) -> torch.Tensor:
        q_BHSd, k_BGSd, v_BGSe = (
            t.unflatten(0, (-1, self.sequence_length)).transpose(1, 2) for t in (q_THd, k_TGd, v_TGe)
        )
        visible = causal_mask(self.sequence_length, self.sequence_length, window, q_THd.device) if window else None
        o_BHSe = F.scaled_dot_product_attention(
            q_BHSd, k_BGSd, v_BGSe, attn_mask=visible, is_causal=visible is None, enable_gqa=True
        )
        return o_BHSe.transpose(1, 2).flatten(0, 1)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [queries, keys]: the last query stands at the last key; each sees keys up to its own, `window` at most."""
    last = keys - queries
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(last)
    return visible if window is None else visible.triu(last - window + 1)


def rotate(x_THd: torch.Tensor, positions_T: torch.Tensor, theta: float) -> torch.Tensor:
    """Turn each pair (i, i + d/2) of a head by position * theta^(-2i/d) (RoFormer, arXiv 2104.09864, section 3.4.2)."""
    half = x_THd.shape[-1] // 2
    exponents = torch.arange(half, device=x_THd.device, dtype=torch.float32) / half
    angles_Th = positions_T[:, None].float() * theta**-exponents
    cos_T1h, sin_T1h = angles_Th.cos()[:, None], angles_Th.sin()[:, None]
    first_THh, second_THh = x_THd.float().chunk(2, dim=-1)
    turned = (first_THh * cos_T1h - second_THh * sin_T1h, second_THh * cos_T1h + first_THh * sin_T1h)
    return torch.cat(turned, dim=-1).type_as(x_THd)


def rotate_interleaved(x_THd: torch.Tensor, positions_T: torch.Tensor, theta: float) -> torch.Tensor:
    """`rotate` for weights that keep the two of a pair side by side; the result has them half a head apart."""
    return rotate(x_THd.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), positions_T, theta)


class _Queries(nn.Module):
    """The map from tokens to queries: one matrix, or two of low rank with a norm between them."""

    def __init__(self, hidden_size: int, width: int, rank: int | None, bias: bool, norm_eps: float) -> None:
        super().__init__()
        self.query_rank = rank
        if rank is None:
            self.q_proj = nn.Linear(hidden_size, width, bias=bias)
        else:
            self.q_a_proj = nn.Linear(hidden_size, rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(rank, eps=norm_eps)
            self.q_b_proj = nn.Linear(rank, width, bias=bias)

    def queries(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self.query_rank is None:
            return self.q_proj(x_TD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))


class Attention(_Queries):
    """Grouped queries; names as Hugging Face's Llama family has them."""

    def __init__(self, config: AttentionConfig, hidden_size: int, layer: int, norm_eps: float) -> None:
        query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        super().__init__(hidden_size, query, config.query_rank, config.qkv_bias, norm_eps)
        self.config, self.layer = config, layer
        self.k_proj = nn.Linear(hidden_size, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, hidden_size, bias=config.output_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm != "none":
            over_head = config.qk_norm == "head"
            self.q_norm = nn.RMSNorm(config.head_dim if over_head else query, eps=norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim if over_head else kv, eps=norm_eps)

    def forward(self, x_TD: torch.Tensor, positions_T: torch.Tensor, attend: Attend) -> torch.Tensor:
        config = self.config
        q_THd = self._heads(self.queries(x_TD), self.q_norm)
        k_TGd = self._heads(self.k_proj(x_TD), self.k_norm)
        v_TGd = self.v_proj(x_TD).unflatten(-1, (-1, config.head_dim))
        q_THd = rotate(q_THd, positions_T, config.rope_theta)
        k_TGd = rotate(k_TGd, positions_T, config.rope_theta)
        o_THd = attend(self.layer, q_THd, k_TGd, v_TGd, config.sliding_window)
        return self.o_proj(o_THd.flatten(1))

    def _heads(self, x_TX: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Cut the width into heads; the norm takes one head or the whole width as a row."""
        split = (-1, self.config.head_dim)
        if self.config.qk_norm == "width":
            return norm(x_TX).unflatten(-1, split)
        return norm(x_TX.unflatten(-1, split))


class LatentAttention(_Queries):
    """Multi-head latent attention; names as Hugging Face's DeepSeek-V3 has them.

    Each head's key is a part made from the latent vector, without position, and a rotary part that all heads share.
    """

    def __init__(self, config: MLAConfig, hidden_size: int, layer: int, norm_eps: float) -> None:
        query = config.heads * (config.nope_head_dim + config.rope_head_dim)
        super().__init__(hidden_size, query, config.query_rank, False, norm_eps)
        self.config, self.layer = config, layer
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, config.kv_rank + config.rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_rank, eps=norm_eps)
        made = config.nope_head_dim + config.value_head_dim
        self.kv_b_proj = nn.Linear(config.kv_rank, config.heads * made, bias=False)
        self.o_proj = nn.Linear(config.heads * config.value_head_dim, hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor, positions_T: torch.Tensor, attend: Attend) -> torch.Tensor:
        config = self.config
        nope, rope = config.nope_head_dim, config.rope_head_dim
        q_THx = self.queries(x_TD).unflatten(-1, (config.heads, -1))
        q_nope_THn, q_rope_THr = q_THx.split([nope, rope], dim=-1)
        latent_TC, k_rope_Tr = self.kv_a_proj_with_mqa(x_TD).split([config.kv_rank, rope], dim=-1)
        kv_THx = self.kv_b_proj(self.kv_a_layernorm(latent_TC)).unflatten(-1, (config.heads, -1))
        k_nope_THn, v_THe = kv_THx.split([nope, config.value_head_dim], dim=-1)
        q_rope_THr = rotate_interleaved(q_rope_THr, positions_T, config.rope_theta)
        k_rope_T1r = rotate_interleaved(k_rope_Tr[:, None], positions_T, config.rope_theta)
        q_THd = torch.cat([q_nope_THn, q_rope_THr], dim=-1)
        k_THd = torch.cat([k_nope_THn, k_rope_T1r.expand(-1, config.heads, -1)], dim=-1)
        return self.o_proj(attend(self.layer, q_THd, k_THd, v_THe).flatten(1))


def build_attention(config: AnyAttention, hidden_size: int, layer: int, norm_eps: float) -> nn.Module:
    """The attention that `config` describes, for layer number `layer`."""
    if isinstance(config, MLAConfig):
        return LatentAttention(config, hidden_size, layer, norm_eps)
    return Attention(config, hidden_size, layer, norm_eps)
