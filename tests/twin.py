"""The model once more, from its equations: float64, one token and one slot at a time, no kernel, no dispatcher.

Parameters come under the names of a checkpoint's tensors, as `shared_weights` makes them of any layout's model.
The equations are those of MoE++ (arXiv 2410.07348) and, for attention, of Llama.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.weights import weights

Weights = dict[str, torch.Tensor]


def shared_weights(module: nn.Module) -> Weights:
    """Every weight of `module` by its shared name: float64 leaves that gather gradients."""
    named = {name: view for weight in weights(module) for name, view in weight.split(weight.parameter).items()}
    return {name: view.detach().double().requires_grad_() for name, view in named.items()}


def shared_gradients(module: nn.Module) -> Weights:
    """The gradients that `module` has, by the same names."""
    found: Weights = {}
    for weight in weights(module):
        grad = weight.parameter.grad
        found.update(weight.split(torch.zeros_like(weight.parameter) if grad is None else grad))
    return found


def gates(config: MoEConfig, logits_N: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """The chosen experts of one token and the factor of each one's answer (section 3.2 and the released code)."""
    chosen = logits_N.detach().topk(config.top_k).indices.tolist()
    g = logits_N.softmax(-1)
    if config.gate_mode == "paper":
        return [(i, g[i]) for i in chosen]
    if config.gate_mode == "released":
        first_zero = config.num_experts - config.zero_experts
        total = sum((g[i] for i in chosen if i < first_zero), g.new_zeros(()))
        return [(i, g[i] / total if i < first_zero else g.new_zeros(())) for i in chosen]
    return [(i, g[i] / sum(g[j] for j in chosen)) for i in chosen]


def expert(config: MoEConfig, w: Weights, prefix: str, i: int, x_D: torch.Tensor) -> torch.Tensor:
    """E_i(x), ids in the order FFN, constant, copy, zero (section 3.1)."""
    if i < config.ffn_experts:
        gate, up, down = (w[f"{prefix}experts.{i}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return down @ (nn.functional.silu(gate @ x_D) * (up @ x_D))
    i -= config.ffn_experts
    if i < config.constant_experts:
        a = (w[f"{prefix}zero_computation.mix"][i] @ x_D).softmax(-1)
        return a[0] * x_D + a[1] * w[f"{prefix}zero_computation.constant"][i]
    return x_D if i - config.constant_experts < config.copy_experts else torch.zeros_like(x_D)


def moe(
    config: MoEConfig, w: Weights, prefix: str, x_TD: torch.Tensor, previous_logits_TN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output and its complete logits (equations 1 and 6)."""
    logits_TN = x_TD @ w[f"{prefix}gate.weight"].T
    if previous_logits_TN is not None and config.gating_residual:
        logits_TN = logits_TN + previous_logits_TN @ w[f"{prefix}gate.gate_map"].T
    scale = config.top_k if config.gate_mode == "released" else 1
    answers = [
        sum(g * expert(config, w, prefix, i, scale * x_D) for i, g in gates(config, logits_N))
        for x_D, logits_N in zip(x_TD, logits_TN, strict=True)
    ]
    return torch.stack([*answers, x_TD.new_zeros(x_TD.shape[1])])[:-1], logits_TN


def rms_norm(x_TD: torch.Tensor, scale_D: torch.Tensor, eps: float) -> torch.Tensor:
    return x_TD * (x_TD.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * scale_D


def attention(
    config: ModelConfig, w: Weights, prefix: str, x_SD: torch.Tensor, positions: list[int] | None = None
) -> torch.Tensor:
    """Causal attention of one sequence, one head and one token at a time. Positions run from 0 unless given."""
    att, d = config.attention, config.attention.head_dim
    at = positions or list(range(len(x_SD)))

    def turned(vector_d: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.complex(vector_d[: d // 2], vector_d[d // 2 :])
        angles = position * att.rope_theta ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag])

    q, k, v = ((x_SD @ w[f"{prefix}{part}_proj.weight"].T).unflatten(-1, (-1, d)) for part in "qkv")
    rows = []
    for s in range(len(x_SD)):
        heads = []
        for head in range(att.heads):
            shared = head // (att.heads // att.kv_heads)
            query = turned(q[s, head], at[s])
            scores = torch.stack([query @ turned(k[p, shared], at[p]) for p in range(s + 1)]) / d**0.5
            heads.append(scores.softmax(-1) @ v[: s + 1, shared])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w[f"{prefix}o_proj.weight"].T


def transformer(config: ModelConfig, w: Weights, tokens: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """logits_TV of one sequence, and the router logits of each layer."""
    x_SD, router_logits = w["embed_tokens.weight"][tokens], list[Any]()
    for i in range(config.layers):
        prefix, eps = f"layers.{i}.", config.norm_eps
        x_SD = x_SD + attention(
            config, w, f"{prefix}self_attn.", rms_norm(x_SD, w[f"{prefix}input_layernorm.weight"], eps)
        )
        normed_SD = rms_norm(x_SD, w[f"{prefix}post_attention_layernorm.weight"], eps)
        previous = router_logits[-1] if router_logits else None
        y_SD, logits_SN = moe(config.moe, w, f"{prefix}mlp.", normed_SD, previous)
        x_SD, router_logits = x_SD + y_SD, [*router_logits, logits_SN]
    return rms_norm(x_SD, w["norm.weight"], config.norm_eps) @ w["lm_head.weight"].T, router_logits
