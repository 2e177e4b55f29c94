"""What sets architectures apart, as a set: what a model has, what a Hugging Face class can hold."""

from __future__ import annotations

from enum import StrEnum

from expertmesh.system.model.attention_config import AttentionConfig, MLAConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.experts_config import SwiGLUConfig
from expertmesh.system.model.moe_config import GateConfig

RELEASED_GATE_WIDTH = 8  # of the released MoE++: numbers between a router's two layers, for each expert
LATENT_NORM_EPS = 1e-6  # transformers gives the norms inside DeepSeek-V3's attention this one, whatever rms_norm_eps is


class Feature(StrEnum):
    """What sets an architecture apart, as an error names it."""

    ZERO_COMPUTATION = "zero-computation experts"
    OTHER_ZERO_COMPUTATION = "zero-computation experts other than 2 constant, 1 copy and 1 zero one, of which top_k=2"
    GATING_RESIDUAL = "gating residuals"
    RELEASED_GATE = "gate_mode=released"
    PAPER_GATE = "gate_mode=paper"
    SIGMOID_GATE = "gate_mode=sigmoid"
    GATE_SCALE = "a gate_scale other than 1"
    SELECTION_BIAS = "a selection bias"
    GROUPS = "expert groups"
    SHARED = "a shared expert without gate"
    GATED_SHARED = "a shared expert with gate"
    ODD_SHARED = "a shared expert that is not as wide as whole routed ones"
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
    QUERY_RANK = "queries made from a narrower vector"
    QUERY_RANK_KEYS = "queries made from a narrower vector for several key heads"
    OUTPUT_GATE = "a gate on attention's answers"
    STICK_BREAKING = "stick-breaking attention"
    NO_POSITIONS = "attention without rotary positions"
    MIXTURE = "a mixture of attentions"
    EXPERT_KIND = "feed-forward networks other than SwiGLU"
    QUANTISED = "quantised experts"
    PYRAMID = "layers with different numbers of experts"
    GATE_LAYERS = "a router of two layers"
    OTHER_GATE_LAYERS = "a router of two layers that is not 8 times as wide as the experts, with tanh and no bias"
    LOGITS_NORM = "normalised router logits"
    SCALE_ADAPTER = "a scale adapter"
    MIXED_SHARED = "a shared expert that is averaged with the routed ones"
    PARALLEL = "attention and experts side by side"
    SHARE_LAYERS = "layers that share their weights"
    DEPTH = "a mixture of depths"
    LAYER_NORM = "norm=layer"
    HEAD_DIM = "a head_dim other than hidden_size / heads"


def features(config: ModelConfig) -> list[Feature]:
    """Those of `config`, in the order of `Feature`."""
    found = _expert_features(config) if config.moe_layers else {Feature.NO_EXPERTS}
    found |= _block_features(config)
    attention = config.attention
    if isinstance(attention, MLAConfig):
        found.add(Feature.LATENT if config.norm_eps == LATENT_NORM_EPS else Feature.LATENT_EPS)
    elif isinstance(attention, AttentionConfig):
        found |= _grouped_query_features(attention, config.hidden_size)
    else:
        found.add(Feature.MIXTURE)
    return [feature for feature in Feature if feature in found]


def _present(candidates: dict[Feature, bool]) -> set[Feature]:
    return {feature for feature, is_there in candidates.items() if is_there}


def _block_features(config: ModelConfig) -> set[Feature]:
    kinds: set[str] = set()
    if config.moe_layers:
        kinds |= {network.kind for network in (config.moe.expert, config.moe.shared) if network}
    if config.dense_layers and config.dense:
        kinds.add(config.dense.kind)
    return _present(
        {
            Feature.EXPERT_KIND: not kinds <= {"swiglu"},
            Feature.PARALLEL: config.block == "parallel",
            Feature.SHARE_LAYERS: config.share_layers,
            Feature.DEPTH: config.depth is not None,
            Feature.LAYER_NORM: config.norm == "layer",
        }
    )


def _grouped_query_features(attention: AttentionConfig, hidden_size: int) -> set[Feature]:
    biases = {(True, True): Feature.ALL_BIAS, (True, False): Feature.QKV_BIAS, (False, True): Feature.OUTPUT_BIAS}
    norms = {"head": Feature.HEAD_NORM, "width": Feature.WIDTH_NORM}
    either = norms.get(attention.qk_norm), biases.get((attention.qkv_bias, attention.output_bias))
    return {feature for feature in either if feature} | _present(
        {
            Feature.WINDOW: attention.sliding_window is not None,
            Feature.HEAD_DIM: attention.heads * attention.head_dim != hidden_size,
            Feature.QUERY_RANK: attention.query_rank is not None,
            Feature.QUERY_RANK_KEYS: attention.query_rank is not None and attention.kv_heads > 1,
            Feature.OUTPUT_GATE: attention.output_gate != "none",
            Feature.STICK_BREAKING: attention.weighting == "stick_breaking",
            Feature.NO_POSITIONS: attention.rope_theta is None,
        }
    )


def _expert_features(config: ModelConfig) -> set[Feature]:
    moe, dense = config.moe, sorted(config.dense_layers)
    first_dense = dense == list(range(len(dense)))
    mixing = moe.shared.mixing if moe.shared else None
    whole_shared = (
        moe.shared is not None
        and isinstance(moe.expert, SwiGLUConfig)
        and moe.shared.hidden_size % moe.expert.hidden_size == 0
    )
    free = moe.constant_experts, moe.copy_experts, moe.zero_experts
    released_gate = GateConfig(hidden_size=RELEASED_GATE_WIDTH * moe.num_experts)
    return _present(
        {
            Feature.EXPERTS: True,
            Feature.ZERO_COMPUTATION: any(free),
            Feature.OTHER_ZERO_COMPUTATION: any(free) and (*free, moe.top_k) != (2, 1, 1, 2),
            Feature.GATING_RESIDUAL: moe.gating_residual and len(config.moe_layers) > 1,
            Feature.RELEASED_GATE: moe.gate_mode == "released",
            Feature.PAPER_GATE: moe.gate_mode == "paper",
            Feature.SIGMOID_GATE: moe.gate_mode == "sigmoid",
            Feature.GATE_SCALE: moe.gate_scale != 1,
            Feature.SELECTION_BIAS: moe.selection_bias,
            Feature.GROUPS: moe.groups is not None,
            Feature.GATED_SHARED: mixing == "sigmoid",
            Feature.MIXED_SHARED: mixing in ("softmax", "mean"),
            Feature.SHARED: mixing == "sum",
            Feature.ODD_SHARED: mixing == "sum" and not whole_shared,
            Feature.FIRST_DENSE: bool(dense) and first_dense,
            Feature.SOME_DENSE: bool(dense) and not first_dense,
            Feature.QUANTISED: moe.quantization is not None,
            Feature.PYRAMID: bool(moe.pyramid),
            Feature.GATE_LAYERS: moe.gate is not None,
            Feature.OTHER_GATE_LAYERS: moe.gate not in (None, released_gate),
            Feature.LOGITS_NORM: moe.logits_norm is not None,
            Feature.SCALE_ADAPTER: moe.scale_adapter,
        }
    )
