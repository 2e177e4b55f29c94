"""Hugging Face's architectures in our terms, one entry for each `model_type`, and the choice of one for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertmesh.system.convert.family import Family, HFConfig
from expertmesh.system.convert.feature import LATENT_NORM_EPS, Feature, features
from expertmesh.system.convert.moe_plus_plus import MOE_PLUS_PLUS
from expertmesh.system.convert.shared_keys import (
    dense_width,
    expert_width,
    grouped_queries,
    plain_experts,
    read_attention,
    read_dense,
    rope_theta,
    write_attention,
)
from expertmesh.system.convert.step3 import STEP3_TEXT, STEP3_VL
from expertmesh.system.model.attention_config import MLAConfig
from expertmesh.system.model.config import ModelConfig
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
            raise ValueError(f"{feature}: no model type of Hugging Face holds such a model")
    of_text = [family for family in FAMILIES.values() if family.text_key is None]
    closest = min(of_text, key=lambda family: len(family.obstacles(config)))
    if obstacles := closest.obstacles(config):
        told = ", ".join(obstacles)
        raise ValueError(
            f"no model type of Hugging Face holds this architecture; {closest.model_type} comes closest, but {told}"
        )
    return closest


def _read_llama(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    attention = read_attention(hf, qkv_bias=bias, output_bias=bias)
    nobody = plain_experts(ffn_experts=1, expert={"hidden_size": 1}, top_k=1)  # no layer has them
    return {"attention": attention, "moe": nobody, **read_dense(hf, list(range(hf.size("num_hidden_layers"))))}


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_attention(config),
        "attention_bias": grouped_queries(config).qkv_bias,
        "intermediate_size": dense_width(config),
    }


def _read_mixtral(hf: HFConfig) -> dict[str, Any]:
    moe = plain_experts(
        ffn_experts=hf["num_local_experts"],
        expert={"hidden_size": hf["intermediate_size"]},
        top_k=hf["num_experts_per_tok"],
        gate_mode="mixtral",
    )
    return {"attention": read_attention(hf, window=hf["sliding_window"]), "moe": moe}


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_attention(config),
        "sliding_window": grouped_queries(config).sliding_window,
        "intermediate_size": expert_width(config),
        "num_local_experts": config.moe.ffn_experts,
        "num_experts_per_tok": config.moe.top_k,
    }


def _softmax_experts(hf: HFConfig, hidden_size_key: str, shared: SharedExpertConfig | None = None) -> MoEConfig:
    return plain_experts(
        ffn_experts=hf.first("num_experts", "num_local_experts"),
        expert={"hidden_size": hf[hidden_size_key]},
        top_k=hf["num_experts_per_tok"],
        gate_mode="mixtral" if hf["norm_topk_prob"] else "paper",
        shared=shared,
    )


def _write_softmax_experts(config: ModelConfig, hidden_size_key: str) -> dict[str, Any]:
    return {
        "num_experts": config.moe.ffn_experts,
        hidden_size_key: expert_width(config),
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": config.moe.gate_mode == "mixtral",
    }


def _read_olmoe(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    attention = read_attention(hf, qk_norm="width", qkv_bias=bias, output_bias=bias)
    return {"attention": attention, "moe": _softmax_experts(hf, "intermediate_size")}


def _write_olmoe(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_attention(config),
        **_write_softmax_experts(config, "intermediate_size"),
        "attention_bias": grouped_queries(config).qkv_bias,
    }


def _qwen_dense(hf: HFConfig) -> dict[str, Any]:
    """A layer has experts where its number, from 1, is a multiple of the step, if no list names it as dense."""
    named, step = set(hf["mlp_only_layers"] or ()), hf.size("decoder_sparse_step")
    layers = range(hf.size("num_hidden_layers"))
    return read_dense(hf, [layer for layer in layers if layer in named or (layer + 1) % step])


def _write_qwen_layers(config: ModelConfig) -> dict[str, Any]:
    window = grouped_queries(config).sliding_window
    return {
        "mlp_only_layers": sorted(config.dense_layers),
        "decoder_sparse_step": 1,
        "intermediate_size": dense_width(config),
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _read_qwen3_moe(hf: HFConfig) -> dict[str, Any]:
    bias = hf["attention_bias"]
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    attention = read_attention(hf, window=window, qk_norm="head", qkv_bias=bias, output_bias=bias)
    return {"attention": attention, "moe": _softmax_experts(hf, "moe_intermediate_size"), **_qwen_dense(hf)}


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_attention(config),
        **_write_softmax_experts(config, "moe_intermediate_size"),
        **_write_qwen_layers(config),
        "attention_bias": grouped_queries(config).qkv_bias,
    }


def _read_qwen2_moe(hf: HFConfig) -> dict[str, Any]:
    shared = SharedExpertConfig(hidden_size=hf["shared_expert_intermediate_size"], mixing="sigmoid")
    return {
        "attention": read_attention(hf, window=_qwen2_window(hf), qkv_bias=hf["qkv_bias"]),
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
    attention = grouped_queries(config)
    assert config.moe.shared is not None
    return {
        **write_attention(config),
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
        rope_theta=rope_theta(hf),
    )
    groups = hf.size("n_group")
    moe = plain_experts(
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
    return {"attention": attention, "moe": moe, **read_dense(hf, list(range(first_dense)))}


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
        "moe_intermediate_size": expert_width(config),
        "num_experts_per_tok": moe.top_k,
        "routed_scaling_factor": moe.gate_scale,
        "n_group": moe.groups.count if moe.groups else 1,
        "topk_group": moe.groups.chosen if moe.groups else 1,
        "n_shared_experts": moe.shared.hidden_size // expert_width(config),
        "first_k_dense_replace": len(config.dense_layers),
        "intermediate_size": dense_width(config),
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
        STEP3_TEXT,
        STEP3_VL,
        MOE_PLUS_PLUS,
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
