"""Hugging Face's architectures in our terms, one entry for each `model_type`, and the choice of one for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertmesh.system.convert.family import Family, HFConfig
from expertmesh.system.convert.feature import LATENT_NORM_EPS, Feature, features
from expertmesh.system.model.attention_config import AttentionConfig, MLAConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.experts_config import SwiGLUConfig
from expertmesh.system.model.moe_config import GroupsConfig, MoEConfig, SharedExpertConfig


def family_of(content: Mapping[str, Any]) -> Family:
    """The family of a `config.json`. Raises ValueError with one line."""
    model_type = content.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type is {model_type!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def choose_family(config: ModelConfig) -> Family:
    """The family that can hold `config`. Raises ValueError that says what stands in the way."""
    for feature in features(config):
        if not any(feature in family.holds | family.needs for family in FAMILIES.values()):
            raise ValueError(f"{feature}: no Hugging Face class holds such a model")
    closest = min(FAMILIES.values(), key=lambda family: len(family.obstacles(config)))
    if obstacles := closest.obstacles(config):
        told = ", ".join(obstacles)
        raise ValueError(
            f"no Hugging Face class holds this architecture; {closest.model_type} comes closest, but {told}"
        )
    return closest


def _rope_theta(hf: HFConfig) -> float:
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


def _read_attention(hf: HFConfig, *, window: int | None = None, **parts: Any) -> AttentionConfig:
    heads, kv_heads = hf.size("num_attention_heads"), hf["num_key_value_heads"]
    return AttentionConfig(
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=hf.size("hidden_size") // heads if hf["head_dim"] is None else hf["head_dim"],
        rope_theta=_rope_theta(hf),
        sliding_window=window,
        **parts,
    )


def _grouped_queries(config: ModelConfig) -> AttentionConfig:
    assert isinstance(config.attention, AttentionConfig)
    return config.attention


def _write_attention(config: ModelConfig) -> dict[str, Any]:
    attention = _grouped_queries(config)
    return {"num_key_value_heads": attention.kv_heads, "head_dim": attention.head_dim}


def _experts(**parts: Any) -> MoEConfig:
    return MoEConfig(zero_experts=0, copy_experts=0, constant_experts=0, gating_residual=False, **parts)


def _dense(hf: HFConfig, layers: list[int]) -> dict[str, Any]:
    return {"dense_layers": tuple(layers), "dense": {"hidden_size": hf["intermediate_size"]} if layers else None}


def _expert_width(config: ModelConfig) -> int:
    assert isinstance(config.moe.expert, SwiGLUConfig)
    return config.moe.expert.hidden_size


def _dense_width(config: ModelConfig) -> int:
    """Of the dense layers; where there are none, what their key may say as well."""
    if config.dense is None:
        return _expert_width(config)
    assert isinstance(config.dense, SwiGLUConfig)
    return config.dense.hidden_size


def _read_llama(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    attention = _read_attention(hf, qkv_bias=bias, output_bias=bias)
    nobody = _experts(ffn_experts=1, expert={"hidden_size": 1}, top_k=1)  # no layer has them
    return {"attention": attention, "moe": nobody, **_dense(hf, list(range(hf.size("num_hidden_layers"))))}


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_attention(config),
        "attention_bias": _grouped_queries(config).qkv_bias,
        "intermediate_size": _dense_width(config),
    }


def _read_mixtral(hf: HFConfig) -> dict[str, Any]:
    moe = _experts(
        ffn_experts=hf["num_local_experts"],
        expert={"hidden_size": hf["intermediate_size"]},
        top_k=hf["num_experts_per_tok"],
        gate_mode="mixtral",
    )
    return {"attention": _read_attention(hf, window=hf["sliding_window"]), "moe": moe}


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_attention(config),
        "sliding_window": _grouped_queries(config).sliding_window,
        "intermediate_size": _expert_width(config),
        "num_local_experts": config.moe.ffn_experts,
        "num_experts_per_tok": config.moe.top_k,
    }


def _softmax_experts(hf: HFConfig, hidden_size_key: str, shared: SharedExpertConfig | None = None) -> MoEConfig:
    return _experts(
        ffn_experts=hf.first("num_experts", "num_local_experts"),
        expert={"hidden_size": hf[hidden_size_key]},
        top_k=hf["num_experts_per_tok"],
        gate_mode="mixtral" if hf["norm_topk_prob"] else "paper",
        shared=shared,
    )


def _write_softmax_experts(config: ModelConfig, hidden_size_key: str) -> dict[str, Any]:
    return {
        "num_experts": config.moe.ffn_experts,
        hidden_size_key: _expert_width(config),
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": config.moe.gate_mode == "mixtral",
    }


def _read_olmoe(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    attention = _read_attention(hf, qk_norm="width", qkv_bias=bias, output_bias=bias)
    return {"attention": attention, "moe": _softmax_experts(hf, "intermediate_size")}


def _write_olmoe(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_attention(config),
        **_write_softmax_experts(config, "intermediate_size"),
        "attention_bias": _grouped_queries(config).qkv_bias,
    }


def _qwen_dense(hf: HFConfig) -> dict[str, Any]:
    """A layer has experts where its number, from 1, is a multiple of the step, if no list names it as dense."""
    named, step = set(hf["mlp_only_layers"] or ()), hf.size("decoder_sparse_step")
    return _dense(hf, [layer for layer in range(hf.size("num_hidden_layers")) if layer in named or (layer + 1) % step])


def _write_qwen_layers(config: ModelConfig) -> dict[str, Any]:
    window = _grouped_queries(config).sliding_window
    return {
        "mlp_only_layers": sorted(config.dense_layers),
        "decoder_sparse_step": 1,
        "intermediate_size": _dense_width(config),
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _read_qwen3_moe(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    attention = _read_attention(hf, window=window, qk_norm="head", qkv_bias=bias, output_bias=bias)
    return {"attention": attention, "moe": _softmax_experts(hf, "moe_intermediate_size"), **_qwen_dense(hf)}


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_attention(config),
        **_write_softmax_experts(config, "moe_intermediate_size"),
        **_write_qwen_layers(config),
        "attention_bias": _grouped_queries(config).qkv_bias,
    }


def _read_qwen2_moe(hf: HFConfig) -> dict[str, Any]:
    shared = SharedExpertConfig(hidden_size=hf["shared_expert_intermediate_size"], mixing="sigmoid")
    return {
        "attention": _read_attention(hf, window=_qwen2_window(hf), qkv_bias=hf["qkv_bias"]),
        "moe": _softmax_experts(hf, "moe_intermediate_size", shared),
        **_qwen_dense(hf),
    }


def _qwen2_window(hf: HFConfig) -> int | None:
    """The window of all layers. By default every second one of the first `max_window_layers` would have it."""
    if not hf["use_sliding_window"]:
        return None
    layers, reach = hf.size("num_hidden_layers"), hf.size("max_window_layers", 0)
    by_default = ["full_attention" if layer % 2 or layer >= reach else "sliding_attention" for layer in range(layers)]
    kinds = set(hf.content.get("layer_types") or by_default)
    if len(kinds) > 1:
        raise ValueError("use_sliding_window is true for some layers only; supported: all layers (layer_types) or none")
    return hf["sliding_window"] if kinds == {"sliding_attention"} else None


def _write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    attention = _grouped_queries(config)
    assert config.moe.shared is not None
    return {
        **_write_attention(config),
        **_write_softmax_experts(config, "moe_intermediate_size"),
        **_write_qwen_layers(config),
        "qkv_bias": attention.qkv_bias,
        "shared_expert_intermediate_size": config.moe.shared.hidden_size,
        "layer_types": [f"{'sliding' if attention.sliding_window else 'full'}_attention"] * config.layers,
    }


def _read_deepseek_v3(hf: HFConfig) -> dict[str, Any]:
    attention = MLAConfig(
        kind="mla",
        heads=hf.size("num_attention_heads"),
        query_rank=hf["q_lora_rank"],
        kv_rank=hf["kv_lora_rank"],
        nope_head_dim=hf["qk_nope_head_dim"],
        rope_head_dim=hf["qk_rope_head_dim"],
        value_head_dim=hf["v_head_dim"],
        rope_theta=_rope_theta(hf),
    )
    groups = hf.size("n_group")
    moe = _experts(
        ffn_experts=hf.first("n_routed_experts", "num_local_experts"),
        expert={"hidden_size": hf.size("moe_intermediate_size")},
        top_k=hf["num_experts_per_tok"],
        gate_mode="sigmoid",
        gate_scale=hf["routed_scaling_factor"],
        selection_bias=True,
        groups=GroupsConfig(count=groups, chosen=hf["topk_group"]) if groups > 1 else None,
        shared=SharedExpertConfig(hidden_size=hf.size("n_shared_experts") * hf.size("moe_intermediate_size")),
    )
    first_dense = min(hf.size("first_k_dense_replace", 0), hf.size("num_hidden_layers"))
    return {"attention": attention, "moe": moe, **_dense(hf, list(range(first_dense)))}


def _write_deepseek_v3(config: ModelConfig) -> dict[str, Any]:
    attention, moe = config.attention, config.moe
    assert isinstance(attention, MLAConfig) and moe.shared is not None
    return {
        "num_key_value_heads": attention.heads,
        "q_lora_rank": attention.query_rank,
        "kv_lora_rank": attention.kv_rank,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.value_head_dim,
        "n_routed_experts": moe.ffn_experts,
        "moe_intermediate_size": _expert_width(config),
        "num_experts_per_tok": moe.top_k,
        "routed_scaling_factor": moe.gate_scale,
        "n_group": moe.groups.count if moe.groups else 1,
        "topk_group": moe.groups.chosen if moe.groups else 1,
        "n_shared_experts": moe.shared.hidden_size // _expert_width(config),
        "first_k_dense_replace": len(config.dense_layers),
        "intermediate_size": _dense_width(config),
        "num_nextn_predict_layers": 0,
    }


_DENSE_AMONG = {Feature.FIRST_DENSE, Feature.SOME_DENSE}
_MIXTRAL_NAMES = (
    (r"\.mlp\.", ".block_sparse_moe."),
    (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
    (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
    (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "mixtral",
            "MixtralForCausalLM",
            needs=frozenset({Feature.EXPERTS}),
            holds=frozenset({Feature.WINDOW, Feature.HEAD_DIM}),
            read=_read_mixtral,
            write=_write_mixtral,
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
            renames=_MIXTRAL_NAMES,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            needs=frozenset({Feature.HEAD_NORM}),
            holds=frozenset(
                {Feature.EXPERTS, Feature.NO_EXPERTS, Feature.PAPER_GATE, *_DENSE_AMONG}
                | {Feature.ALL_BIAS, Feature.WINDOW, Feature.HEAD_DIM}
            ),
            read=_read_qwen3_moe,
            write=_write_qwen3_moe,
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            needs=frozenset({Feature.EXPERTS, Feature.GATED_SHARED}),
            holds=frozenset({Feature.PAPER_GATE, Feature.QKV_BIAS, Feature.WINDOW, Feature.HEAD_DIM, *_DENSE_AMONG}),
            read=_read_qwen2_moe,
            write=_write_qwen2_moe,
            defaults={"qkv_bias": True, "max_window_layers": 28},
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            needs=frozenset({Feature.EXPERTS, Feature.WIDTH_NORM}),
            holds=frozenset({Feature.PAPER_GATE, Feature.ALL_BIAS}),
            read=_read_olmoe,
            write=_write_olmoe,
            defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": None},
            only={"clip_qkv": None},
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            needs=frozenset(
                {Feature.EXPERTS, Feature.LATENT, Feature.SIGMOID_GATE, Feature.SELECTION_BIAS, Feature.SHARED}
            ),
            holds=frozenset({Feature.GROUPS, Feature.GATE_SCALE, Feature.FIRST_DENSE}),
            read=_read_deepseek_v3,
            write=_write_deepseek_v3,
            only={
                "rms_norm_eps": LATENT_NORM_EPS,
                "norm_topk_prob": True,
                "rope_interleave": True,
                "attention_bias": False,
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "moe_layer_freq": 1,
            },
            renames=((r"\.shared_expert\.", ".shared_experts."),),
            prediction_layers=True,
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            needs=frozenset({Feature.NO_EXPERTS}),
            holds=frozenset({Feature.ALL_BIAS, Feature.HEAD_DIM}),
            read=_read_llama,
            write=_write_llama,
            defaults={"num_key_value_heads": None},
            only={"mlp_bias": False},
        ),
    )
}
