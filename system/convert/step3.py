"""Step-3 (arXiv 2507.19427): a language model with multi-matrix factorization attention, alone or behind a vision part.

The layout is that of the published checkpoint and of vLLM's `Step3TextConfig`: the routed experts of a layer lie in one
tensor for each of their three matrices, and the layers that have them are listed in a text, "4,5,6". The queries are

    q = wq inter_norm(q_proj x)        one key head and one value head for all of them
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from expertmesh.system.convert.family import Family, HFConfig
from expertmesh.system.convert.feature import Feature
from expertmesh.system.convert.shared_keys import (
    dense_width,
    expert_width,
    grouped_queries,
    plain_experts,
    read_dense,
    rope_theta,
)
from expertmesh.system.model.attention_config import AttentionConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.moe_config import SharedExpertConfig


def _moe_layers(hf: HFConfig) -> list[int]:
    listed = hf["moe_layers_enum"]
    try:
        return sorted({int(layer) for layer in (listed.split(",") if isinstance(listed, str) else listed)})
    except (TypeError, ValueError):
        raise ValueError(f"moe_layers_enum is {listed!r}; supported: layer numbers such as '4,5,6'") from None


def _read(hf: HFConfig) -> dict[str, Any]:
    moe_layers, layers = _moe_layers(hf), range(hf.size("num_hidden_layers"))
    if not set(moe_layers) <= set(layers):
        raise ValueError(f"moe_layers_enum is {hf['moe_layers_enum']!r}; supported: layers from 0 to {layers[-1]}")
    attention = AttentionConfig(
        heads=hf.size("num_attention_heads"),
        kv_heads=1,
        head_dim=hf["head_dim"],
        rope_theta=rope_theta(hf),
        query_rank=hf.size("share_q_dim"),
    )
    moe = plain_experts(
        ffn_experts=hf["moe_num_experts"],
        expert={"hidden_size": hf["moe_intermediate_size"]},
        top_k=hf["moe_top_k"],
        gate_mode="mixtral" if hf["norm_expert_weight"] else "paper",
        shared=SharedExpertConfig(hidden_size=hf["share_expert_dim"]),
    )
    return {"attention": attention, "moe": moe, **read_dense(hf, [n for n in layers if n not in moe_layers])}


def _write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = grouped_queries(config), config.moe
    assert moe.shared is not None
    return {
        "max_position_embedding": config.context_length,
        "max_seq_len": config.context_length,
        "head_dim": attention.head_dim,
        "share_q_dim": attention.query_rank,
        "moe_num_experts": moe.ffn_experts,
        "moe_intermediate_size": expert_width(config),
        "moe_top_k": moe.top_k,
        "norm_expert_weight": moe.gate_mode == "mixtral",
        "moe_layers_enum": ",".join(map(str, config.moe_layers)),
        "share_expert_dim": moe.shared.hidden_size,
        "intermediate_size": dense_width(config),
    }


STEP3_TEXT = Family(
    "step3_text",
    "Step3TextForCausalLM",
    needs=frozenset({Feature.EXPERTS, Feature.QUERY_RANK, Feature.SHARED}),
    holds=frozenset(
        {Feature.ODD_SHARED, Feature.PAPER_GATE, Feature.HEAD_DIM, Feature.FIRST_DENSE, Feature.SOME_DENSE}
    ),
    read=_read,
    write=_write,
    defaults={
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "head_dim": 256,
        "share_q_dim": 2048,
        "norm_expert_weight": False,
    },
    only={"num_attention_groups": 1},
    renames=(
        (r"\.q_a_proj\.", ".q_proj."),
        (r"\.q_a_layernorm\.", ".inter_norm."),
        (r"\.q_b_proj\.", ".wq."),
        (r"\.mlp\.shared_expert\.", ".share_expert."),
        (r"\.mlp\.gate\.", ".moe.gate."),
        (r"\.mlp\.experts\.\d+\.", ".moe."),
    ),
    stacked=r"\.moe\.(gate|up|down)_proj\.weight$",
)
STEP3_VL = replace(
    STEP3_TEXT,
    model_type="step3_vl",
    text_key="text_config",
    other_parts=r"(model\.)?(vision_model|vit_downsampler2?|vit_large_projector)\.",
)
