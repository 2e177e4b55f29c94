"""The architecture as data: counted parameters are those of the module, the published sizes, and what is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_model

from expertmesh.system.model.attention_config import AttentionConfig, MixtureAttentionConfig, MLAConfig
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.experts_config import SparkConfig, StructuredConfig, SwiGLUConfig, VersatileConfig
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


MODULEFORMER_GATE = {"hidden_size": 256, "activation": "gelu", "bias": True}


@pytest.mark.parametrize(
    "layers, top_k, total, active", [(24, 2, 3.76, 0.39), (24, 4, 3.76, 0.64), (48, 2, 7.43, 0.68)]
)
def test_published_sizes_of_moduleformer(layers, top_k, total, active):
    """MoLM 350M-4B, 700M-4B and 700M-8B: the released configuration, its 50,304 tokens and a head of its own."""
    attention = MixtureAttentionConfig(
        kind="mixture",
        experts=16,
        top_k=top_k,
        heads=8,
        kv_heads=8,
        head_dim=64,
        kv_bias=True,
        rope_theta=None,
        weighting="stick_breaking",
        gate=MODULEFORMER_GATE,
    )
    expert = {"kind": "mlp", "hidden_size": 2048, "activation": "gelu_tanh"}
    moe = MoEConfig(ffn_experts=32, top_k=top_k, expert=expert, gate=MODULEFORMER_GATE, **PLAIN)
    config = ModelConfig(vocab_size=50_304, layers=layers, hidden_size=1024, norm="layer", attention=attention, moe=moe)
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == config.num_params()
    assert config.num_params() / 1e9 == pytest.approx(total, abs=0.006)
    assert config.num_active_params() / 1e9 == pytest.approx(active, abs=0.006)


def deepspeed(layers: int, width: int, experts: int | list[int], residual: bool = False) -> ModelConfig:
    """DeepSpeed-MoE (arXiv 2201.05596): GPT with 4 D GeLU networks and top-1 experts in every second layer.

    Assumed where the paper is silent: 50,257 tokens, the embedding as head, no biases but those of norms. Rotary
    positions have no weights. A list of `experts` is a pyramid, and gives the number of MoE layers.
    """
    listed = experts if isinstance(experts, list) else [experts] * (layers // 2)
    moe_layers = list(range(1, layers, 2))[: len(listed)]
    network = {"kind": "mlp", "hidden_size": 4 * width}
    shared = {**network, "mixing": "softmax"} if residual else None
    return ModelConfig(
        vocab_size=50_257,
        layers=layers,
        hidden_size=width,
        norm="layer",
        tie_embeddings=True,
        attention=AttentionConfig(heads=width // 64, kv_heads=width // 64, head_dim=64),
        moe=MoEConfig(ffn_experts=listed, expert=network, top_k=1, shared=shared, **PLAIN),
        dense_layers=[layer for layer in range(layers) if layer not in moe_layers],
        dense=network,
    )


class Published(NamedTuple):
    """What their figure counts: ours, and whether the networks that experts replaced, and the embedding."""

    config: ModelConfig
    ours: float  # billions
    active: float  # billions; with a plain gate, those in the name
    theirs: float
    within: float  # half of the last digit given, or why it is more
    replaced: bool = False
    embedding: bool = True


TRAINED_350M, TRAINED_1_3B = deepspeed(24, 1024, 128), deepspeed(24, 2048, 128)
DEEPSPEED = {
    "350M+MoE-128": Published(TRAINED_350M, 13.14, 0.355, 13.2, 0.05, replaced=True),
    "1.3B+MoE-128": Published(TRAINED_1_3B, 52.45, 1.314, 52.8, 0.06, replaced=True),  # cut, not rounded
    "350M PR-MoE-32/64": Published(deepspeed(24, 1024, [32] * 10 + [64] * 2, True), 4.11, 0.455, 4.11, 0.005),
    "1.3B PR-MoE-64/128": Published(deepspeed(24, 2048, [64] * 10 + [128] * 2, True), 31.38, 1.716, 31.4, 0.05),
    # Theirs takes an eighth of the embedding away with an eighth of the layers.
    "350M PR-MoE, 21 layers": Published(deepspeed(21, 1024, [32] * 8 + [64] * 2, True), 3.54, 0.400, 3.53, 0.01),
    "1.3B PR-MoE, 21 layers": Published(deepspeed(21, 2048, [64] * 8 + [128] * 2, True), 26.93, 1.497, 26.9, 0.05),
    "1.3B+MoE-128 served": Published(TRAINED_1_3B, 52.45, 1.314, 52, 0.5, embedding=False),
    "2.4B+MoE-128 served": Published(deepspeed(16, 3584, 128), 107.05, 2.650, 107.7, 0.05, True, embedding=False),
    # The table gives 30 layers to 8B and 40 to 24B. Neither name nor total fits that (262 and 1396 billion); exchanged,
    # both names do. What we then count as they do is 348.98 and 1054.97: we take 1064.9 for a slip of one digit.
    "8B+MoE-128 served": Published(deepspeed(40, 4096, 128), 349.18, 8.270, 349.0, 0.05, embedding=False),
    "24B+MoE-128 served": Published(deepspeed(30, 8192, 128), 1047.33, 24.588, 1064.9, 10.0, True, embedding=False),
    "47B+MoE-128 served": Published(deepspeed(58, 8192, 128), 2024.45, 47.152, 2024.0, 0.05, embedding=False),
}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_published_sizes_of_deepspeed_moe(name):
    config, ours, active, theirs, within, replaced, embedding = DEEPSPEED[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == config.num_params()
    assert config.num_params() / 1e9 == pytest.approx(ours, abs=0.006)
    assert config.num_active_params() / 1e9 == pytest.approx(active, abs=0.0006)
    counted = config.num_params() + replaced * 8 * config.hidden_size**2 * len(config.moe_layers)
    counted -= 0 if embedding else 50_257 * config.hidden_size
    assert counted / 1e9 == pytest.approx(theirs, abs=within)


@pytest.mark.parametrize(
    "layers, width, hidden, millions",
    [(12, 768, 4096, "29.7"), (24, 1024, 4096, "40.9"), (32, 1280, 5120, "63.3")],
    ids=["WideNet-B/16", "WideNet-L/16", "WideNet-H"],
)
def test_published_sizes_of_widenet(layers, width, hidden, millions):
    """WideNet (arXiv 2107.11817) sees pictures: our blocks and final norm, and around them what it has and we lack."""
    config = ModelConfig(
        vocab_size=1,
        tie_embeddings=True,
        layers=layers,
        hidden_size=width,
        norm="layer",
        share_layers=True,
        attention=AttentionConfig(heads=width // 64, kv_heads=width // 64, head_dim=64),
        moe=MoEConfig(ffn_experts=4, expert={"kind": "mlp", "hidden_size": hidden}, **PLAIN),
    )
    blocks = config.num_params() - width  # an embedding of one token is not theirs
    biases = 4 * width + 4 * (hidden + width)  # of one attention and of four experts
    patches = 16 * 16 * 3 * width + width
    positions = (14 * 14 + 1) * width  # the class token is no parameter
    head = width * width + width + width * 1000 + 1000  # a layer with tanh, then 1000 classes
    assert f"{(blocks + biases + patches + positions + head) / 1e6:.1f}" == millions


def test_expert_names_follow_the_order_of_ids():
    moe = MoEConfig(ffn_experts=2, constant_experts=2, copy_experts=1, zero_experts=1)
    assert moe.expert_names == ["ffn 0", "ffn 1", "constant 0", "constant 1", "copy 0", "zero 0"]
    assert (moe.num_experts, moe.zero_computation_experts) == (6, 4)


MIXTURE = {"kind": "mixture", "experts": 4, "top_k": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
STRUCTURED = {"kind": "structured", "hidden_size": 24}
VERSATILE = {"kind": "versatile", "hidden_size": 24}

BAD: list[tuple[type, dict[str, Any], str, str]] = [
    (AttentionConfig, {"heads": 8, "kv_heads": 3}, "kv_heads=3 does not divide heads=8", "groups must be whole"),
    (AttentionConfig, {"head_dim": 7}, "multiple of 2", "rotary positions turn pairs"),
    (AttentionConfig, {"output_gate": "layer"}, "'none', 'head' or 'element'", "an unknown gate of attention"),
    (MixtureAttentionConfig, {**MIXTURE, "kv_heads": 3}, "kv_heads=3 does not divide heads=4", "groups of an expert"),
    (MixtureAttentionConfig, {**MIXTURE, "top_k": 5}, "top_k=5 is more than experts=4", "more than there are"),
    (
        MixtureAttentionConfig,
        {**MIXTURE, "own_kv": True},
        "own_kv with top_k=2 of experts=4",
        "a later token may choose an expert that an earlier one made no keys for",
    ),
    (
        MoEConfig,
        {"ffn_experts": 1, "constant_experts": 0, "copy_experts": 0, "zero_experts": 0},
        "top_k=2",
        "k above N",
    ),
    (MoEConfig, {"top_k": 0}, "greater than or equal to 1", "a token goes somewhere"),
    (MoEConfig, {"tau": 0}, "greater than 0", "zero-computation experts would be free"),
    (MoEConfig, {"gate_mode": "switch"}, "'paper', 'released', 'mixtral' or 'sigmoid'", "an unknown gate"),
    (SwiGLUConfig, {"nested": [0.5, 0.25, 1]}, "nested=[0.5, 0.25, 1.0]: shares of the width rise", "shares that fall"),
    (SwiGLUConfig, {"nested": [0.25, 0.5]}, "shares of the width rise from above 0 to 1", "the whole is not trained"),
    (SwiGLUConfig, {"nested": [0, 1]}, "shares of the width rise from above 0 to 1", "no units at all"),
    (
        SwiGLUConfig,
        {"hidden_size": 10, "nested": [0.25, 1]},
        "nested=0.25 of hidden_size=10 is no whole number of units",
        "half a unit",
    ),
    (StructuredConfig, {**STRUCTURED, "form": "low_rank"}, "rank=None: low_rank and block_dense need", "no rank"),
    (StructuredConfig, {**STRUCTURED, "form": "block_shuffle", "rank": 4}, "block_shuffle has none", "a rank too much"),
    (
        StructuredConfig,
        {**STRUCTURED, "form": "low_rank", "rank": 4, "blocks": 2},
        "blocks=2: low_rank has no blocks",
        "blocks of a low-rank matrix",
    ),
    (
        StructuredConfig,
        {**STRUCTURED, "form": "block_shuffle", "blocks": 5},
        "blocks=5 does not divide hidden_size=24",
        "uneven blocks of hidden units",
    ),
    (
        StructuredConfig,
        {**STRUCTURED, "form": "block_dense", "blocks": 4, "rank": 6},
        "blocks=4 does not divide rank=6",
        "uneven blocks of what lies between the factors",
    ),
    (
        ModelConfig,
        {"hidden_size": 30, "moe": {"expert": {**STRUCTURED, "form": "block_shuffle", "blocks": 4}}},
        "blocks=4 does not divide model.hidden_size=30",
        "uneven blocks of a token",
    ),
    (SparkConfig, {"kind": "spark", "hidden_size": 8, "kept": 8}, "kept=8 must be below hidden_size=8", "all kept"),
    (
        ModelConfig,
        {"hidden_size": 32, "moe": {"expert": {"kind": "spark", "hidden_size": 8, "kept": 2, "predictor_width": 32}}},
        "predictor_width=32 must be below model.hidden_size=32",
        "nothing left for up to read",
    ),
    (VersatileConfig, {**VERSATILE, "slices": 5}, "slices=5 does not divide hidden_size=24", "uneven slices"),
    (VersatileConfig, {**VERSATILE, "slices": 2, "top_k": 3}, "top_k=3 is more than slices=2", "too many slices"),
    (MoEConfig, {"expert": VERSATILE}, "'versatile' found using 'kind' does not match", "it adds its own residuals"),
    (
        ModelConfig,
        {"dense_layers": [0], "dense": VERSATILE, "block": "parallel"},
        "dense.kind=versatile adds to what attention wrote",
        "a parallel block has no token after attention",
    ),
    (
        ModelConfig,
        {"dense_layers": [0], "dense": {"hidden_size": 8, "nested": [0.5, 1]}},
        "moe.expert.nested=[] and dense.nested=[0.5, 1.0] differ",
        "one width is drawn for all layers",
    ),
    (
        MoEConfig,
        {"ffn_experts": [4, 1], **PLAIN},
        "top_k=2 is more than all 1 experts of a layer",
        "k above N in one layer of a pyramid",
    ),
    (MoEConfig, {"ffn_experts": [4, -1]}, "greater than or equal to 0", "a layer of a pyramid with less than none"),
    (MoEConfig, {"ffn_experts": []}, "valid integer", "a pyramid of no layers"),
    (MoEConfig, {"ffn_experts": 4, "pyramid": [2, 8]}, "ffn_experts=4 is not the most of pyramid=[2, 8]", "two sizes"),
    (MoEConfig, {"ffn_experts": [4, 8]}, "gating_residual=true: layers of [4, 8] experts do not fit", "no square map"),
    (
        MoEConfig,
        {"scale_adapter": True, "gate_mode": "mixtral"},
        "scale_adapter goes with gate_mode=paper, not mixtral",
        "weights that are divided by their sum",
    ),
    (MoEConfig, {"noise": "gumbel_second", "top_k": 1}, "top_k=1 has none of it", "no second choice to draw"),
    (
        MoEConfig,
        {"noise": "gumbel", "gate_mode": "sigmoid"},
        "noise=gumbel goes with the softmax gates",
        "no softmax to draw from",
    ),
    (
        MoEConfig,
        {"ffn_experts": 1, "top_k": 1, "logits_norm": 1, **PLAIN},
        "logits_norm=1: one expert's logit has no standard deviation",
        "the spread of one number",
    ),
    (MoEConfig, {"logits_norm": 0}, "greater than 0", "all logits alike"),
    (
        MoEConfig,
        {"ffn_experts": [8, 6], "gate_mode": "sigmoid", "groups": {"count": 4, "chosen": 2}, **PLAIN},
        "groups.count=4 must cut 6 experts into equal groups",
        "groups that do not fit one layer of a pyramid",
    ),
    (MoEConfig, {"capacity": {"factor": 0}}, "greater than 0", "nobody is served"),
    (MoEConfig, {"shared": {"kind": "spark", "hidden_size": 8}}, "does not match any of the expected tags", "unknown"),
    (ModelConfig, {"moe": {"ffn_experts": [4, 8], "gating_residual": False}}, "2 numbers for 4 MoE layers", "too few"),
    (
        ModelConfig,
        {"share_layers": True},
        "share_layers=true goes with MoE layers that are all alike and moe.gating_residual=false",
        "the first layer has no map of logits, the others would",
    ),
    (
        ModelConfig,
        {"share_layers": True, "moe": PLAIN, "dense_layers": [0], "dense": {"hidden_size": 8}},
        "share_layers=true goes with MoE layers that are all alike",
        "a dense layer cannot share with experts",
    ),
    (
        ModelConfig,
        {"share_layers": True, "moe": {**PLAIN, "ffn_experts": [4, 4, 4, 8]}},
        "share_layers=true goes with MoE layers that are all alike",
        "a pyramid cannot share",
    ),
    (ModelConfig, {"dense_layers": [1]}, "dense_layers=[1] need dense", "what stands there is not said"),
    (ModelConfig, {"dense_layers": [4], "dense": {"hidden_size": 8}}, "4 is not one of 4 layers", "no such layer"),
    (ModelConfig, {"dense_layers": [1, 1], "dense": {"hidden_size": 8}}, "names a layer twice", "counted twice"),
    (ModelConfig, {"moe": PLAIN, "depth": {"layers": [-1]}}, "depth.layers=[-1]: -1 is not one of 4 layers", "no such"),
    (ModelConfig, {"moe": PLAIN, "depth": {"layers": [2, 2]}}, "depth.layers=[2, 2] names a layer twice", "twice"),
    (ModelConfig, {"moe": PLAIN, "depth": {"layers": []}}, "at least 1 item", "a router for no layer"),
    (ModelConfig, {"moe": PLAIN, "depth": {"layers": [1], "kept": 0}}, "greater than 0", "nobody goes through"),
    (
        ModelConfig,
        {"depth": {"layers": [1]}},
        "depth goes with moe.gating_residual=false: a skipped token has no logits to pass on",
        "a hole in the chain of logits",
    ),
    (ModelConfig, {"hidden": 4}, "Extra inputs", "a misspelt key"),
    (ModelConfig, {"vocab_size": 0}, "greater than or equal to 1", "no tokens"),
]


@pytest.mark.parametrize("kind, keys, words, reason", BAD, ids=[reason for *_, reason in BAD])
def test_what_is_refused(kind, keys, words, reason):
    with pytest.raises(ValidationError) as error:
        kind(**keys)
    assert words in error.value.errors()[0]["msg"]
