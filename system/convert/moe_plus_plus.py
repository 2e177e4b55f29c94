"""MoE++ as it was released (arXiv 2410.07348; SkyworkAI/MoE-plus-plus): Llama with MoE++ layers, inference code only.

num_experts         one number in a list: all experts of a layer, of which the last are 2 constant, copy, zero
experts.0.up_proj   the expert's gate and, after it, what it gates: one matrix of twice the width
gate.wg.0, wg.2     the router's two layers; gate.wg, where `moe_2layer_gate` is false
gate.gate_map       the gating residual; the first layer's is there and never read
"""

from __future__ import annotations

import re
from typing import Any

from expertmesh.system.convert.family import Family, HFConfig
from expertmesh.system.convert.feature import RELEASED_GATE_WIDTH, Feature
from expertmesh.system.convert.layout import Shapes
from expertmesh.system.convert.shared_keys import expert_width, read_attention, write_attention
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.moe_config import GateConfig, MoEConfig

CONSTANT, COPY, ZERO = 2, 1, 1  # experts that the code makes of each kind
FREE = CONSTANT + COPY + ZERO
TOP_K = 2


def _read(hf: HFConfig) -> dict[str, Any]:
    listed = hf["num_experts"]
    if not isinstance(listed, list) or len(set(listed)) != 1 or not isinstance(listed[0], int) or listed[0] <= FREE:
        raise ValueError(f"num_experts is {listed!r}; supported: one number above {FREE} in a list, such as [20]")
    if not hf["moe_use_mixtral_gating"] and hf["moe_feature_no_mul_topk"]:
        raise ValueError(
            f"moe_feature_no_mul_topk is True; supported: False, by which experts see {TOP_K} times their input, "
            "unless moe_use_mixtral_gating is True"
        )
    moe = MoEConfig(
        ffn_experts=listed[0] - FREE,
        expert={"kind": "swiglu", "hidden_size": hf["intermediate_size"]},
        constant_experts=CONSTANT,
        copy_experts=COPY,
        zero_experts=ZERO,
        top_k=TOP_K,
        gate=GateConfig(hidden_size=RELEASED_GATE_WIDTH * listed[0]) if hf["moe_2layer_gate"] else None,
        gate_mode="mixtral" if hf["moe_use_mixtral_gating"] else "released",
        logits_norm=hf["moe_gate_norm_std"] if hf["moe_use_logits_norm"] else None,
    )
    return {"attention": read_attention(hf), "moe": moe}


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_attention(config),
        "intermediate_size": expert_width(config),
        "num_experts": [config.moe.num_experts],
        "moe_2layer_gate": config.moe.gate is not None,
        "moe_use_mixtral_gating": config.moe.gate_mode == "mixtral",
        "moe_feature_no_mul_topk": False,
        "moe_use_logits_norm": config.moe.logits_norm is not None,
        "moe_gate_norm_std": config.moe.logits_norm or 1.0,
    }


def _constant_experts(name: str, config: ModelConfig) -> list[str]:
    """Their numbers go on after the FFN experts'."""
    found = re.fullmatch(r"(layers\.\d+\.mlp\.)zero_computation\.(mix|constant)", name)
    if not found:
        return []
    part = {"mix": "wg.weight", "constant": "constant"}[found[2]]
    return [f"{found[1]}experts.{config.moe.ffn_experts + number}.{part}" for number in range(CONSTANT)]


def _unused(config: ModelConfig) -> Shapes:
    return {"model.layers.0.mlp.moe.gate.gate_map.weight": (config.moe.num_experts, config.moe.num_experts)}


MOE_PLUS_PLUS = Family(
    "MoE++",
    "MoeForCausalLM",
    needs=frozenset({Feature.EXPERTS, Feature.ZERO_COMPUTATION, Feature.GATING_RESIDUAL}),
    holds=frozenset({Feature.RELEASED_GATE, Feature.GATE_LAYERS, Feature.LOGITS_NORM}),
    read=_read,
    write=_write,
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "moe_2layer_gate": True,
        "moe_use_mixtral_gating": False,
        "moe_feature_no_mul_topk": False,
        "moe_use_logits_norm": False,
        "moe_gate_norm_std": 1.0,
    },
    only={"moe_expert_interval": 1},  # their dense layer cannot be called as their block calls it
    renames=(
        (r"\.mlp\.", ".mlp.moe."),
        (r"\.gate\.(\w+\.)?inner\.", ".gate.wg.0."),
        (r"\.gate\.(\w+\.)?outer\.", ".gate.wg.2."),
        (r"\.gate\.weight$", ".gate.wg.weight"),
        (r"\.gate\.gate_map$", ".gate.gate_map.weight"),
        (r"\.experts\.(\d+)\.", r".experts.experts.\1."),
        (r"(\.experts\.\d+)\.gate_proj\.", r"\1.up_proj."),
    ),
    entries=_constant_experts,
    unused=_unused,
)
