"""Parts of a configuration that several families of Hugging Face spell alike, read and written."""

from __future__ import annotations

from typing import Any

from expertmesh.system.convert.family import HFConfig
from expertmesh.system.model.attention_config import AttentionConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.experts_config import SwiGLUConfig
from expertmesh.system.model.moe_config import MoEConfig


def rope_theta(hf: HFConfig) -> float:
    """From `rope_parameters` of newer files, `rope_theta` beside `rope_scaling` of older ones."""
    key = "rope_scaling" if hf.content.get("rope_scaling") else "rope_parameters"
    rope = hf.content.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{key} is {dict(rope)!r}; supported: rope_type 'default', the same for all layers")
    partial = rope.get("partial_rotary_factor", hf.content.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {partial!r}; supported: 1.0")
    return rope.get("rope_theta", hf["rope_theta"])


def read_attention(hf: HFConfig, *, window: int | None = None, **parts: Any) -> AttentionConfig:
    heads, kv_heads = hf.size("num_attention_heads"), hf["num_key_value_heads"]
    return AttentionConfig(
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=hf.size("hidden_size") // heads if hf["head_dim"] is None else hf["head_dim"],
        rope_theta=rope_theta(hf),
        sliding_window=window,
        **parts,
    )


def grouped_queries(config: ModelConfig) -> AttentionConfig:
    assert isinstance(config.attention, AttentionConfig)
    return config.attention


def write_attention(config: ModelConfig) -> dict[str, Any]:
    attention = grouped_queries(config)
    return {"num_key_value_heads": attention.kv_heads, "head_dim": attention.head_dim}


def plain_experts(**parts: Any) -> MoEConfig:
    return MoEConfig(zero_experts=0, copy_experts=0, constant_experts=0, gating_residual=False, **parts)


def read_dense(hf: HFConfig, layers: list[int]) -> dict[str, Any]:
    return {"dense_layers": tuple(layers), "dense": {"hidden_size": hf["intermediate_size"]} if layers else None}


def expert_width(config: ModelConfig) -> int:
    assert isinstance(config.moe.expert, SwiGLUConfig)
    return config.moe.expert.hidden_size


def dense_width(config: ModelConfig) -> int:
    """Of the dense layers; where there are none, what their key may say as well."""
    if config.dense is None:
        return expert_width(config)
    assert isinstance(config.dense, SwiGLUConfig)
    return config.dense.hidden_size
