"""Two published models that transformers has no class for, from their equations: float64, on their own tensors.

Each has a small config.json, random tensors under the published names, and the logits that they stand for. No name, no
layout and no arithmetic is taken from the code that is tested.

Step-3    spec: arXiv 2507.19427 and 2412.19255; the names as in its modeling_step3.py and in vLLM's step3_text.py
MoE++     spec: arXiv 2410.07348; the names and the gate as in SkyworkAI/MoE-plus-plus, moe_plus_plus_layer.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]
VOCAB_SIZE, CONTEXT = 97, 128


class Twin(NamedTuple):
    """A published model."""

    config: Config  # its config.json
    tensors: Callable[[Config], Tensors]  # random ones, float32
    logits: Callable[[Config, Tensors, list[int]], torch.Tensor]  # [T, V] float64, of tensors of any dtype


def save_twin(twin: Twin, folder: Path, tensors: Tensors | None = None, **config: Any) -> Tensors:
    """Write config and tensors, in two files with an index; return the tensors."""
    folder.mkdir(parents=True)
    content = twin.config | config
    (folder / "config.json").write_text(json.dumps(content))
    tensors = twin.tensors(content) if tensors is None else tensors
    weight_map = {}
    for number in range(2):
        part = {name: tensors[name] for name in list(tensors)[number::2]}
        save_file(part, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def _random(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """No norm is 1, and the weights are wide enough to say different things."""
    generator = torch.Generator().manual_seed(11)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * t if "norm" in name else 0.25 * t for name, t in drawn.items()}


def _norm(x_TD: torch.Tensor, scale_D: torch.Tensor, eps: float) -> torch.Tensor:
    return x_TD * (x_TD.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * scale_D


def _attend(q_THd: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor, theta: float) -> torch.Tensor:
    """Causal attention with rotary positions; [T, H * d]."""
    length, heads, d = q_THd.shape
    angles = torch.arange(length)[:, None, None] * theta ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(x_THd: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(x_THd[..., : d // 2], x_THd[..., d // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    group = heads // k_TGd.shape[1]
    q, k, v = turned(q_THd), turned(k_TGd).repeat_interleave(group, 1), v_TGd.repeat_interleave(group, 1)
    scores_HTT = torch.einsum("thd,shd->hts", q, k) / d**0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights_HTT = scores_HTT.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights_HTT, v).flatten(1)


STEP3_CONFIG: Config = {
    "architectures": ["Step3TextForCausalLM"],
    "model_type": "step3_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_attention_groups": 1,
    "head_dim": 12,
    "share_q_dim": 20,
    "max_seq_len": CONTEXT,
    "max_position_embedding": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000,
    "rope_scaling": None,
    "moe_num_experts": 6,
    "moe_top_k": 3,
    "moe_intermediate_size": 24,
    "share_expert_dim": 28,
    "norm_expert_weight": False,
    "moe_layers_enum": "1,2",
    "torch_dtype": "float32",
}


def step3_tensors(c: Config) -> Tensors:
    width, d, heads = c["hidden_size"], c["head_dim"], c["num_attention_heads"]
    moe_layers = c["moe_layers_enum"].split(",")

    def mlp(prefix: str, inner: int, stack: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
        shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        return {f"{prefix}.{part}.weight": (*stack, *shape) for part, shape in shapes.items()}

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], width)}
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        shapes |= {
            f"{p}.input_layernorm.weight": (width,),
            f"{p}.post_attention_layernorm.weight": (width,),
            f"{p}.self_attn.q_proj.weight": (c["share_q_dim"], width),
            f"{p}.self_attn.inter_norm.weight": (c["share_q_dim"],),
            f"{p}.self_attn.wq.weight": (heads * d, c["share_q_dim"]),
            f"{p}.self_attn.k_proj.weight": (d, width),
            f"{p}.self_attn.v_proj.weight": (d, width),
            f"{p}.self_attn.o_proj.weight": (width, heads * d),
        }
        if str(layer) in moe_layers:
            shapes[f"{p}.moe.gate.weight"] = (c["moe_num_experts"], width)
            shapes |= mlp(f"{p}.moe", c["moe_intermediate_size"], (c["moe_num_experts"],))
            shapes |= mlp(f"{p}.share_expert", c["share_expert_dim"])
        else:
            shapes |= mlp(f"{p}.mlp", c["intermediate_size"])
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (c["vocab_size"], width)}
    return _random(shapes)


def step3_logits(c: Config, tensors: Tensors, token_ids: list[int]) -> torch.Tensor:
    w = {name: tensor.double() for name, tensor in tensors.items()}
    eps, d = c["rms_norm_eps"], c["head_dim"]

    def swiglu(x: torch.Tensor, prefix: str, expert: int | None = None) -> torch.Tensor:
        gate, up, down = (w[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        if expert is not None:
            gate, up, down = gate[expert], up[expert], down[expert]
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T

    x_TD = w["model.embed_tokens.weight"][token_ids]
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        y_TD = _norm(x_TD, w[f"{p}.input_layernorm.weight"], eps)
        low_TR = _norm(y_TD @ w[f"{p}.self_attn.q_proj.weight"].T, w[f"{p}.self_attn.inter_norm.weight"], eps)
        q_THd = (low_TR @ w[f"{p}.self_attn.wq.weight"].T).unflatten(-1, (-1, d))
        k_T1d, v_T1d = (y_TD @ w[f"{p}.self_attn.{part}_proj.weight"].T for part in "kv")
        attended = _attend(q_THd, k_T1d[:, None], v_T1d[:, None], c["rope_theta"])
        x_TD = x_TD + attended @ w[f"{p}.self_attn.o_proj.weight"].T
        y_TD = _norm(x_TD, w[f"{p}.post_attention_layernorm.weight"], eps)
        if f"{p}.moe.gate.weight" not in w:
            x_TD = x_TD + swiglu(y_TD, f"{p}.mlp")
            continue
        rows = []
        for y_D in y_TD:
            g_N = (w[f"{p}.moe.gate.weight"] @ y_D).softmax(-1)
            chosen = g_N.topk(c["moe_top_k"]).indices.tolist()
            total = sum(g_N[i] for i in chosen) if c["norm_expert_weight"] else 1
            rows.append(sum(g_N[i] / total * swiglu(y_D, f"{p}.moe", i) for i in chosen))
        x_TD = x_TD + torch.stack(rows) + swiglu(y_TD, f"{p}.share_expert")
    return _norm(x_TD, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


MOE_PLUS_PLUS_CONFIG: Config = {
    "architectures": ["MoeForCausalLM"],
    "model_type": "MoE++",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "num_experts": [9],
    "moe_expert_interval": 1,
    "moe_use_mixtral_gating": False,
    "moe_2layer_gate": True,
    "moe_use_logits_norm": False,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": False,
    "torch_dtype": "float32",
}


def moe_plus_plus_tensors(c: Config) -> Tensors:
    width, inner, (experts,) = c["hidden_size"], c["intermediate_size"], c["num_experts"]
    kv = width // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], width)}
    for layer in range(c["num_hidden_layers"]):
        p, m = f"model.layers.{layer}", f"model.layers.{layer}.mlp.moe"
        shapes |= {f"{p}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        shapes |= {f"{p}.self_attn.{part}_proj.weight": (width, width) for part in "qo"}
        shapes |= {f"{p}.self_attn.{part}_proj.weight": (kv, width) for part in "kv"}
        if c["moe_2layer_gate"]:
            shapes |= {f"{m}.gate.wg.0.weight": (8 * experts, width), f"{m}.gate.wg.2.weight": (experts, 8 * experts)}
        else:
            shapes[f"{m}.gate.wg.weight"] = (experts, width)
        shapes[f"{m}.gate.gate_map.weight"] = (experts, experts)
        for expert in range(experts - 4):
            shapes[f"{m}.experts.experts.{expert}.up_proj.weight"] = (2 * inner, width)
            shapes[f"{m}.experts.experts.{expert}.down_proj.weight"] = (width, inner)
        for expert in (experts - 4, experts - 3):
            shapes[f"{m}.experts.experts.{expert}.constant"] = (width,)
            shapes[f"{m}.experts.experts.{expert}.wg.weight"] = (2, width)
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (c["vocab_size"], width)}
    return _random(shapes)


def moe_plus_plus_logits(c: Config, tensors: Tensors, token_ids: list[int]) -> torch.Tensor:
    w = {name: tensor.double() for name, tensor in tensors.items()}
    eps, (experts,), heads = c["rms_norm_eps"], c["num_experts"], c["num_attention_heads"]
    d = c["hidden_size"] // heads

    def answer(m: str, i: int, x_D: torch.Tensor) -> torch.Tensor:
        p = f"{m}.experts.experts.{i}"
        if i < experts - 4:
            a_F, b_F = (w[f"{p}.up_proj.weight"] @ x_D).chunk(2)
            return w[f"{p}.down_proj.weight"] @ (silu(a_F) * b_F)
        if i < experts - 2:
            a = (w[f"{p}.wg.weight"] @ x_D).softmax(-1)
            return a[0] * x_D + a[1] * w[f"{p}.constant"]
        return x_D if i == experts - 2 else torch.zeros_like(x_D)

    x_TD = w["model.embed_tokens.weight"][token_ids]
    before_TN = None
    for layer in range(c["num_hidden_layers"]):
        p, m = f"model.layers.{layer}", f"model.layers.{layer}.mlp.moe"
        y_TD = _norm(x_TD, w[f"{p}.input_layernorm.weight"], eps)
        q, k, v = ((y_TD @ w[f"{p}.self_attn.{part}_proj.weight"].T).unflatten(-1, (-1, d)) for part in "qkv")
        x_TD = x_TD + _attend(q, k, v, c["rope_theta"]) @ w[f"{p}.self_attn.o_proj.weight"].T
        y_TD = _norm(x_TD, w[f"{p}.post_attention_layernorm.weight"], eps)
        if c["moe_2layer_gate"]:
            z_TN = torch.tanh(y_TD @ w[f"{m}.gate.wg.0.weight"].T) @ w[f"{m}.gate.wg.2.weight"].T
        else:
            z_TN = y_TD @ w[f"{m}.gate.wg.weight"].T
        if before_TN is not None:
            z_TN = z_TN + before_TN @ w[f"{m}.gate.gate_map.weight"].T
        before_TN, rows = z_TN, []
        for y_D, z_N in zip(y_TD, z_TN, strict=True):
            if c["moe_use_logits_norm"]:
                z_N = z_N / (z_N.std() / c["moe_gate_norm_std"])
            chosen = z_N.topk(2).indices.tolist()
            if c["moe_use_mixtral_gating"]:
                g = dict(zip(chosen, z_N[chosen].softmax(-1), strict=True))
            else:
                g_N = z_N.softmax(-1)
                g = {i: g_N[i] if i != experts - 1 else torch.zeros(()) for i in chosen}
                g = {i: value / sum(g.values()) for i, value in g.items()}
                y_D = 2 * y_D
            rows.append(sum(g[i] * answer(m, i, y_D) for i in chosen))
        x_TD = x_TD + torch.stack(rows)
    return _norm(x_TD, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


STEP3 = Twin(STEP3_CONFIG, step3_tensors, step3_logits)
MOE_PLUS_PLUS = Twin(MOE_PLUS_PLUS_CONFIG, moe_plus_plus_tensors, moe_plus_plus_logits)
