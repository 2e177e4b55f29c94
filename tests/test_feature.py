"""Every option that sets an architecture apart has a feature, and what no model type holds is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_model

from expertmesh.system.convert.families import FAMILIES, choose_family
from expertmesh.system.convert.feature import Feature, features
from expertmesh.system.model.config import DepthConfig, ModelConfig

PLAIN = {"zero_experts": 0, "copy_experts": 0, "constant_experts": 0, "gating_residual": False, "gate_mode": "mixtral"}
DENSE = (0, 1, 2)


def mixtral(moe: dict[str, Any] | None = None, attention: dict[str, Any] | None = None, **model: Any) -> ModelConfig:
    """A model that Mixtral's class holds, but for what is changed."""
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 8}
    return tiny_model(moe={**PLAIN, **(moe or {})}, attention={**heads, **(attention or {})}, **model)


STRUCTURED = {"kind": "structured", "hidden_size": 24, "form": "low_rank", "rank": 4}
SPARK = {"kind": "spark", "hidden_size": 24, "kept": 4}
GELU_GATE = {"hidden_size": 8 * 4, "activation": "gelu"}

# Each: the model, the feature that stands in its way everywhere.
NOWHERE: list[tuple[ModelConfig, Feature]] = [
    (mixtral(attention={"output_gate": "head"}), Feature.OUTPUT_GATE),
    (mixtral(attention={"output_gate": "element"}), Feature.OUTPUT_GATE),
    (mixtral(attention={"weighting": "stick_breaking", "rope_theta": None}), Feature.STICK_BREAKING),
    (mixtral(attention={"rope_theta": None}), Feature.NO_POSITIONS),
    (mixtral(attention={"output_bias": True}), Feature.OUTPUT_BIAS),
    (mixtral(attention={"query_rank": 12}), Feature.QUERY_RANK_KEYS),
    (mixtral(attention={"kind": "mixture", "experts": 2, "top_k": 2}), Feature.MIXTURE),
    (mixtral({"expert": STRUCTURED}), Feature.EXPERT_KIND),
    (mixtral({"expert": SPARK}), Feature.EXPERT_KIND),
    (mixtral({"expert": {"kind": "mlp", "hidden_size": 24}}), Feature.EXPERT_KIND),
    (mixtral({"expert": {"kind": "modulated", "adaptor_size": 24}}), Feature.EXPERT_KIND),
    (mixtral(dense_layers=(1,), dense={"kind": "mlp", "hidden_size": 24}), Feature.EXPERT_KIND),
    (mixtral(dense_layers=DENSE, dense={"kind": "versatile", "hidden_size": 24}), Feature.EXPERT_KIND),
    (mixtral({"quantization": {"scheme": "fp8-block"}}), Feature.QUANTISED),
    (mixtral({"ffn_experts": [4, 4, 8]}), Feature.PYRAMID),
    (mixtral({"gate": GELU_GATE}), Feature.OTHER_GATE_LAYERS),
    (mixtral({"gate": {"hidden_size": 8}}), Feature.OTHER_GATE_LAYERS),
    (mixtral({"scale_adapter": True, "gate_mode": "paper"}), Feature.SCALE_ADAPTER),
    (mixtral({"shared": {"hidden_size": 32, "mixing": "softmax"}}), Feature.MIXED_SHARED),
    (mixtral({"shared": {"hidden_size": 32, "mixing": "mean"}}), Feature.MIXED_SHARED),
    (mixtral({"copy_experts": 1}), Feature.OTHER_ZERO_COMPUTATION),
    (mixtral(block="parallel"), Feature.PARALLEL),
    (mixtral(share_layers=True), Feature.SHARE_LAYERS),
    (mixtral(depth=DepthConfig(layers=(1,))), Feature.DEPTH),
    (mixtral(norm="layer"), Feature.LAYER_NORM),
]


@pytest.mark.parametrize("config, feature", NOWHERE, ids=[f"{n}: {f.name}" for n, (_, f) in enumerate(NOWHERE)])
def test_what_no_model_type_holds_is_refused_by_its_name(config, feature):
    assert feature in features(config)
    with pytest.raises(ValueError) as refused:
        choose_family(config)
    named = [f for f in features(config) if not any(f in family.holds | family.needs for family in FAMILIES.values())]
    assert feature in named
    assert str(refused.value) == f"{named[0]}: no model type of Hugging Face holds such a model"


def test_every_feature_is_held_somewhere_or_refused_here():
    somewhere = {feature for family in FAMILIES.values() for feature in family.holds | family.needs}
    assert set(Feature) == somewhere | {feature for _, feature in NOWHERE} | {Feature.LATENT_EPS}


# What a model may have and still go out: the class need not know of it.
NO_OBSTACLE: list[tuple[str, ModelConfig]] = [
    ("nested networks are plain ones at full width", mixtral({"expert": {"hidden_size": 32, "nested": [0.5, 1]}})),
    ("capacity drops tokens in training alone", mixtral({"capacity": {"factor": 1.1}})),
    ("noise is of training", mixtral({"noise": "jitter"})),
    ("losses are of training", mixtral({"balance_loss": "switch", "z_loss_weight": 0.1, "tau": 0.5})),
    ("a residual of one layer adds nothing", mixtral({"gating_residual": True}, layers=1)),
]


@pytest.mark.parametrize("config", [c[1] for c in NO_OBSTACLE], ids=[c[0] for c in NO_OBSTACLE])
def test_what_is_no_obstacle(config):
    assert choose_family(config).model_type == "mixtral"
