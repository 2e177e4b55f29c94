"""The architecture as data: counted parameters are those of the module, the published sizes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_model

from expertmesh.system.model.attention_config import AttentionConfig, MLAConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import weights

SIZES: list[tuple[dict[str, Any], str]] = [
    ({}, "everything"),
    ({"layers": 1}, "one layer: no gating residual to count"),
    ({"moe": {"gating_residual": False}}, "no gating residual"),
    ({"moe": {"constant_experts": 0, "copy_experts": 0, "zero_experts": 0}}, "FFN experts only"),
    ({"moe": {"ffn_experts": 0}}, "no FFN experts"),
    ({"moe": {"ffn_experts": 1}}, "fewer FFN experts than k: all of them are active"),
    ({"attention": AttentionConfig(heads=6, kv_heads=2, head_dim=4)}, "heads that do not add up to the width"),
]


@pytest.mark.parametrize("changes, reason", SIZES, ids=[reason for _, reason in SIZES])
def test_parameters_are_those_of_the_module(changes, reason):
    config = tiny_model(**changes)
    with torch.device("meta"):
        model = Transformer(config)
    counted = sum(p.numel() for p in model.parameters())
    experts = sum(w.parameter.numel() for w in weights(model) if w.is_expert)
    share = min(config.moe.top_k, config.moe.ffn_experts) / max(config.moe.ffn_experts, 1)
    assert config.num_params() == counted
    assert config.num_active_params() == counted - experts + round(experts * share)


def published(layers: int, width: int, hidden: int, heads: int, ffn: int, constant: int) -> ModelConfig:
    """A row of the paper's size table: as many key-value heads as heads, one zero and one copy expert."""
    return ModelConfig(
        vocab_size=65_536,
        layers=layers,
        hidden_size=width,
        attention=AttentionConfig(heads=heads, kv_heads=heads, head_dim=width // heads),
        moe=MoEConfig(ffn_experts=ffn, expert={"hidden_size": hidden}, constant_experts=constant),
    )


@pytest.mark.parametrize(
    "config, billions",
    [
        (published(12, 768, 2048, 12, 8, 2), "0.58"),
        (published(12, 768, 2048, 12, 16, 2), "1.03"),
        (published(12, 768, 2048, 12, 32, 6), "1.94"),
        (published(24, 1536, 4096, 16, 16, 2), "7.68"),
    ],
    ids=["MoE++ 0.6B", "MoE++ 1B", "MoE++ 2B", "MoE++ 7B"],
)
def test_published_sizes(config, billions):
    """MoE++ (arXiv 2410.07348), table of sizes: embeddings (65,536 tokens, untied), attention and FFN experts.

    Router, norms and constant experts add 0.03 % and are not in these figures; the 1B model would round up with them.
    """
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Transformer(config).named_parameters()}
    assert sum(sizes.values()) == config.num_params()
    large = sum(n for name, n in sizes.items() if not any(k in name for k in ("norm", "gate.", "zero_computation")))
    assert f"{large / 1e9:.2f}" == billions
    assert config.num_params() == pytest.approx(large, rel=4e-4)


PLAIN = {"zero_experts": 0, "copy_experts": 0, "constant_experts": 0, "gating_residual": False}

# From the models' public configurations; (architecture, all parameters, active parameters) in billions as published.
PUBLISHED = {
    "Step-3": (
        ModelConfig(
            vocab_size=128_815,
            layers=61,
            hidden_size=7168,
            context_length=65_536,
            attention=AttentionConfig(heads=64, kv_heads=1, head_dim=256, rope_theta=5e5, query_rank=2048),
            moe=MoEConfig(ffn_experts=48, expert={"hidden_size": 5120}, top_k=3, shared={"hidden_size": 5120}, **PLAIN),
            dense_layers=(0, 1, 2, 3, 60),
            dense={"hidden_size": 18_432},
        ),
        316.3,
        38.8,
    ),
    "DeepSeek-V3": (
        ModelConfig(
            vocab_size=129_280,
            layers=61,
            hidden_size=7168,
            attention=MLAConfig(
                kind="mla",
                heads=128,
                query_rank=1536,
                kv_rank=512,
                nope_head_dim=128,
                rope_head_dim=64,
                value_head_dim=128,
            ),
            moe=MoEConfig(
                ffn_experts=256,
                expert={"hidden_size": 2048},
                top_k=8,
                shared={"hidden_size": 2048},
                gate_mode="sigmoid",
                selection_bias=True,
                **PLAIN,
            ),
            dense_layers=(0, 1, 2),
            dense={"hidden_size": 18_432},
        ),
        671.0,
        37.6,
    ),
    "Mixtral 8x7B": (
        ModelConfig(
            vocab_size=32_000,
            layers=32,
            hidden_size=4096,
            attention=AttentionConfig(heads=32, kv_heads=8, head_dim=128),
            moe=MoEConfig(ffn_experts=8, expert={"hidden_size": 14_336}, top_k=2, gate_mode="mixtral", **PLAIN),
        ),
        46.7,
        12.9,
    ),
    "Qwen3-30B-A3B": (
        ModelConfig(
            vocab_size=151_936,
            layers=48,
            hidden_size=2048,
            attention=AttentionConfig(heads=32, kv_heads=4, head_dim=128, qk_norm="head"),
            moe=MoEConfig(ffn_experts=128, expert={"hidden_size": 768}, top_k=8, gate_mode="mixtral", **PLAIN),
        ),
        30.5,
        3.3,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_of_large_models(name):
    config, total, active = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == config.num_params()
    assert config.num_params() / 1e9 == pytest.approx(total, abs=0.06)
    assert config.num_active_params() / 1e9 == pytest.approx(active, abs=0.06)


def test_expert_names_follow_the_order_of_ids():
    moe = MoEConfig(ffn_experts=2, constant_experts=2, copy_experts=1, zero_experts=1)
    assert moe.expert_names == ["ffn 0", "ffn 1", "constant 0", "constant 1", "copy 0", "zero 0"]
    assert (moe.num_experts, moe.zero_computation_experts) == (6, 4)


BAD: list[tuple[type, dict[str, Any], str, str]] = [
    (AttentionConfig, {"heads": 8, "kv_heads": 3}, "kv_heads=3 does not divide heads=8", "groups must be whole"),
    (AttentionConfig, {"head_dim": 7}, "multiple of 2", "rotary positions turn pairs"),
    (
        MoEConfig,
        {"ffn_experts": 1, "constant_experts": 0, "copy_experts": 0, "zero_experts": 0},
        "top_k=2",
        "k above N",
    ),
    (MoEConfig, {"top_k": 0}, "greater than or equal to 1", "a token goes somewhere"),
    (MoEConfig, {"tau": 0}, "greater than 0", "zero-computation experts would be free"),
    (MoEConfig, {"gate_mode": "switch"}, "'paper', 'released', 'mixtral' or 'sigmoid'", "an unknown gate"),
    (ModelConfig, {"hidden": 4}, "Extra inputs", "a misspelt key"),
    (ModelConfig, {"vocab_size": 0}, "greater than or equal to 1", "no tokens"),
]


@pytest.mark.parametrize("kind, keys, words, reason", BAD, ids=[reason for *_, reason in BAD])
def test_what_is_refused(kind, keys, words, reason):
    with pytest.raises(ValidationError) as error:
        kind(**keys)
    assert words in error.value.errors()[0]["msg"]
