"""What sets architectures apart, as a set: what a model has, what a Hugging Face class can hold."""

from __future__ import annotations

from enum import StrEnum

from expertmesh.system.model.config import MLAConfig, ModelConfig

LATENT_NORM_EPS = 1e-6  # transformers gives the norms inside DeepSeek-V3's attention this one, whatever rms_norm_eps is


class Feature(StrEnum):
    """What sets an architecture apart, as an error names it."""

    ZERO_COMPUTATION = "zero-computation experts"
    GATING_RESIDUAL = "gating residuals"
    RELEASED_GATE = "gate_mode=released"
    PAPER_GATE = "gate_mode=paper"
    SIGMOID_GATE = "gate_mode=sigmoid"
    GATE_SCALE = "a gate_scale other than 1"
    SELECTION_BIAS = "a selection bias"
    GROUPS = "expert groups"
    SHARED = "a shared expert without gate, as wide as whole routed ones"
    GATED_SHARED = "a shared expert with gate"
    ODD_SHARED = "a shared expert without gate, not as wide as whole routed ones"
    EXPERTS = "routed experts"
    NO_EXPERTS = "dense layers only"
    FIRST_DENSE = "dense first layers"
    SOME_DENSE = "dense layers among the others"
    LATENT = "latent attention"
    LATENT_EPS = f"latent attention with a norm_eps other than {LATENT_NORM_EPS}"
    HEAD_NORM = "norms over each query and key head"
    WIDTH_NORM = "norms over all query and key heads"
    QKV_BIAS = "biases of queries, keys and values alone"
    ALL_BIAS = "biases of all attention projections"
    OUTPUT_BIAS = "a bias of the attention output alone"
    WINDOW = "a sliding window"
    HEAD_DIM = "a head_dim other than hidden_size / heads"


def features(config: ModelConfig) -> list[Feature]:
    """Those of `config`, in the order of `Feature`."""
    found = _expert_features(config) if config.moe_layers else {Feature.NO_EXPERTS}
    attention = config.attention
    if isinstance(attention, MLAConfig):
        found.add(Feature.LATENT if config.norm_eps == LATENT_NORM_EPS else Feature.LATENT_EPS)
    else:
        biases = {(True, True): Feature.ALL_BIAS, (True, False): Feature.QKV_BIAS, (False, True): Feature.OUTPUT_BIAS}
        norms = {"head": Feature.HEAD_NORM, "width": Feature.WIDTH_NORM}
        window = Feature.WINDOW if attention.sliding_window else None
        head_dim = Feature.HEAD_DIM if attention.heads * attention.head_dim != config.hidden_size else None
        bias = biases.get((attention.qkv_bias, attention.output_bias))
        found |= {feature for feature in (norms.get(attention.qk_norm), bias, window, head_dim) if feature}
    return [feature for feature in Feature if feature in found]


def _expert_features(config: ModelConfig) -> set[Feature]:
    moe, dense = config.moe, sorted(config.dense_layers)
    first_dense = dense == list(range(len(dense)))
    whole_shared = moe.shared is not None and moe.shared.hidden_size % moe.expert_hidden_size == 0
    present = {
        Feature.EXPERTS: True,
        Feature.ZERO_COMPUTATION: moe.zero_computation_experts > 0,
        Feature.GATING_RESIDUAL: moe.gating_residual and len(config.moe_layers) > 1,
        Feature.RELEASED_GATE: moe.gate_mode == "released",
        Feature.PAPER_GATE: moe.gate_mode == "paper",
        Feature.SIGMOID_GATE: moe.gate_mode == "sigmoid",
        Feature.GATE_SCALE: moe.gate_scale != 1,
        Feature.SELECTION_BIAS: moe.selection_bias,
        Feature.GROUPS: moe.groups is not None,
        Feature.GATED_SHARED: moe.shared is not None and moe.shared.gate,
        Feature.SHARED: moe.shared is not None and not moe.shared.gate and whole_shared,
        Feature.ODD_SHARED: moe.shared is not None and not moe.shared.gate and not whole_shared,
        Feature.FIRST_DENSE: bool(dense) and first_dense,
        Feature.SOME_DENSE: bool(dense) and not first_dense,
    }
    return {feature for feature, is_there in present.items() if is_there}
