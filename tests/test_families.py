"""Configurations and names of Hugging Face's families: both ways, and refused where nothing here computes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from foreign import EACH_FAMILY, MODELS, hf_config
from tiny import tiny_model

from expertmesh.system.convert.families import FAMILIES, choose_family, family_of
from expertmesh.system.convert.feature import Feature, features
from expertmesh.system.convert.huggingface import tensor_shapes
from expertmesh.system.model.attention_config import AttentionConfig, MLAConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.moe_config import SharedExpertConfig


def content_of(name: str) -> dict[str, Any]:
    """As config.json holds it."""
    return json.loads(hf_config(name).to_json_string(use_diff=False))


def config_of(name: str) -> ModelConfig:
    return FAMILIES[MODELS[name][0]].to_model_config(content_of(name))


def test_every_family_has_a_model_here():
    """Or a twin in foreign_twins.py, where transformers has no class."""
    assert {*EACH_FAMILY, "step3_text", "step3_vl", "MoE++"} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_configurations_come_back(name):
    config = config_of(name)
    family = choose_family(config)
    assert family.model_type == MODELS[name][0]
    content = json.loads(json.dumps(family.to_hf_config(config)))
    assert family.to_model_config(content) == config
    loaded = transformers.AutoConfig.for_model(**content)  # what transformers takes it for
    assert family.to_model_config(json.loads(loaded.to_json_string(use_diff=False))) == config


@pytest.mark.parametrize("name", MODELS)
def test_names_are_one_to_one(name):
    family = FAMILIES[MODELS[name][0]]
    names = [family.hf_name(ours) for ours in tensor_shapes(config_of(name))]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("model_type", EACH_FAMILY)
def test_keys_left_out_mean_what_transformers_takes_for_them(model_type):
    family, content = FAMILIES[model_type], content_of(EACH_FAMILY[model_type])
    may_be_left_out = {*family.defaults, *family.only, "hidden_act", "initializer_range", "rms_norm_eps", "head_dim"}
    may_be_left_out |= {"attention_bias", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"}
    may_be_left_out |= {"use_sliding_window", "sliding_window", "layer_types", "tie_word_embeddings"}
    may_be_left_out |= {"rope_parameters", "rope_theta"}
    short = {key: value for key, value in content.items() if key not in may_be_left_out}
    whole = transformers.AutoConfig.for_model(**short).to_dict()
    assert len(short) < len(whole)
    assert family.to_model_config(short) == family.to_model_config(whole)


NAMES = [
    ("mixtral", "layers.2.mlp.gate.weight", "model.layers.2.block_sparse_moe.gate.weight"),
    ("mixtral", "layers.2.mlp.experts.13.gate_proj.weight", "model.layers.2.block_sparse_moe.experts.13.w1.weight"),
    ("mixtral", "layers.2.mlp.experts.13.down_proj.weight", "model.layers.2.block_sparse_moe.experts.13.w2.weight"),
    ("mixtral", "layers.2.mlp.experts.13.up_proj.weight", "model.layers.2.block_sparse_moe.experts.13.w3.weight"),
    ("qwen2_moe", "layers.0.mlp.shared_expert_gate.weight", "model.layers.0.mlp.shared_expert_gate.weight"),
    ("deepseek_v3", "layers.9.mlp.shared_expert.up_proj.weight", "model.layers.9.mlp.shared_experts.up_proj.weight"),
    ("llama", "lm_head.weight", "lm_head.weight"),
    ("llama", "norm.weight", "model.norm.weight"),
]


@pytest.mark.parametrize("model_type, ours, theirs", NAMES, ids=[ours for _, ours, _ in NAMES])
def test_names(model_type, ours, theirs):
    assert FAMILIES[model_type].hf_name(ours) == theirs


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("an unknown architecture", "llama", {"model_type": "gpt_oss"}, "model_type is 'gpt_oss'; supported: mixtral, "),
    ("no model type", "llama", {"model_type": None}, "model_type is None"),
    ("another activation", "olmoe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported for olmoe: 'silu'"),
    ("clipped projections", "olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; supported for olmoe: None"),
    ("biases in dense layers", "llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("weights that do not add up to 1", "deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("halves of rotary pairs apart", "deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
    ("biases in latent attention", "deepseek_v3", {"attention_bias": True}, "attention_bias is True"),
    ("a softmax gate", "deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ("no shared expert", "deepseek_v3", {"n_shared_experts": None}, "n_shared_experts is None"),
    (
        "longer contexts by YaRN, older files",
        "deepseek_v3",
        {"rope_scaling": {"type": "yarn", "factor": 40}},
        "rope_scaling is {'type': 'yarn', 'factor': 40}; supported: rope_type 'default'",
    ),
    (
        "longer contexts of Llama 3, newer files",
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
        "rope_parameters is {'rope_type': 'llama3'",
    ),
    (
        "rotary frequencies by kind of layer",
        "qwen3_moe",
        {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}},
        "the same for all layers",
    ),
    ("a part of the head turned", "llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("a window in some layers", "qwen2_moe", {"use_sliding_window": True, "layer_types": None}, "some layers only"),
    (
        "four-bit weights",
        "llama",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantization_config has quant_method 'gptq'",
    ),
    ("a size that is no number", "mixtral", {"hidden_size": "4096"}, "hidden_size is '4096'"),
    ("more choices than experts", "mixtral", {"num_experts_per_tok": 9}, "top_k=9 is more than all 5 experts"),
    ("heads that do not divide", "llama", {"num_key_value_heads": 3}, "kv_heads=3 does not divide heads=4"),
    ("a wide norm of other heads", "olmoe", {"head_dim": 12}, "cannot hold a head_dim other than"),
]


@pytest.mark.parametrize("model_type, changes, told", [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_is_not_computed_is_refused(model_type, changes, told):
    name = next(name for name, (kind, _) in MODELS.items() if kind == model_type)
    content = content_of(name)
    family_of(content).to_model_config(content)  # as it is, it is read
    with pytest.raises(ValueError) as refused:
        family_of(content | changes).to_model_config(content | changes)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_key_is_named():
    content = content_of("llama")
    del content["num_hidden_layers"]
    with pytest.raises(ValueError, match="no key 'num_hidden_layers'"):
        FAMILIES["llama"].to_model_config(content)


def without_zero_computation(**moe: Any) -> dict[str, Any]:
    return {"zero_experts": 0, "copy_experts": 0, "constant_experts": 0, "gating_residual": False, **moe}


NOWHERE: list[tuple[str, dict[str, Any], str]] = [
    ("MoE++ of the paper", {}, "MoE++ comes closest, but cannot hold gate_mode=paper"),
    ("one copy expert", {"moe": without_zero_computation(copy_experts=1)}, "of which top_k=2: no model type of"),
    ("gating residuals", {"moe": without_zero_computation(gating_residual=True)}, "closest, but"),
    ("the released gate", {"moe": without_zero_computation(gate_mode="released")}, "closest, but"),
    (
        "Mixtral with other weights",
        {"moe": without_zero_computation(gate_mode="paper")},
        "mixtral comes closest, but cannot hold gate_mode=paper",
    ),
    (
        "a bias of the output alone",
        {
            "moe": without_zero_computation(gate_mode="mixtral"),
            "attention": AttentionConfig(heads=4, kv_heads=2, head_dim=8, output_bias=True),
        },
        "a bias of the attention output alone: no",
    ),
    (
        "a shared expert of its own width",
        {"moe": without_zero_computation(gate_mode="sigmoid", shared=SharedExpertConfig(hidden_size=33))},
        "closest, but",
    ),
    (
        "latent attention with a softmax gate",
        {
            "norm_eps": 1e-6,
            "moe": without_zero_computation(gate_mode="mixtral"),
            "attention": MLAConfig(kind="mla", heads=2, kv_rank=8, nope_head_dim=8, rope_head_dim=4, value_head_dim=8),
        },
        "closest, but",
    ),
]


@pytest.mark.parametrize("changes, told", [c[1:] for c in NOWHERE], ids=[c[0] for c in NOWHERE])
def test_what_no_class_holds_is_said(changes, told):
    with pytest.raises(ValueError) as refused:
        choose_family(tiny_model(**changes))
    assert told in str(refused.value)


def test_experts_that_no_layer_has_stand_in_nobodys_way():
    """A dense model's `moe` section is left as it comes."""
    config = tiny_model(dense_layers=(0, 1, 2), dense={"hidden_size": 48})
    assert config.moe.zero_computation_experts and features(config) == [Feature.NO_EXPERTS]
    assert choose_family(config).model_type == "llama"
