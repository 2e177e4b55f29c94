"""Step-3 and MoE++ as they were published: read where they lie, brought in, sent out; against their equations.

The layouts of system/convert/step3.py and moe_plus_plus.py; transformers has no class for either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_twins import MOE_PLUS_PLUS, STEP3, VOCAB_SIZE, Twin, save_twin
from numerics import assert_close
from safetensors.torch import load_file
from tiny import context_of

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.timeline import Turns
from expertmesh.system.convert.families import choose_family, family_of
from expertmesh.system.convert.huggingface import from_hf, open_hf, to_hf
from expertmesh.system.model.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from expertmesh.system.model.transformer import ExpertPool, Transformer
from expertmesh.system.model.weights import weights
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.request import Request, Sampling

TOKENS = torch.randint(VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(2)).tolist()

# Each: the twin, its config's other keys, and why.
VARIANTS: list[tuple[str, Twin, dict[str, Any]]] = [
    ("Step-3: dense layers at both ends", STEP3, {}),
    ("Step-3: weights that add up to 1", STEP3, {"norm_expert_weight": True}),
    ("Step-3: one expert, in all layers", STEP3, {"moe_num_experts": 1, "moe_top_k": 1, "moe_layers_enum": "0,1,2,3"}),
    ("MoE++: the defaults of the released code", MOE_PLUS_PLUS, {}),
    ("MoE++: one FFN expert, a router of one layer", MOE_PLUS_PLUS, {"num_experts": [5], "moe_2layer_gate": False}),
    ("MoE++: Mixtral's gate", MOE_PLUS_PLUS, {"moe_use_mixtral_gating": True, "moe_feature_no_mul_topk": True}),
    ("MoE++: normalised logits", MOE_PLUS_PLUS, {"moe_use_logits_norm": True, "moe_gate_norm_std": 2.5}),
]
EACH = pytest.mark.parametrize("twin, config", [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])


def loaded(checkpoint: Checkpoint) -> Transformer:
    model = Transformer(checkpoint.config)
    checkpoint.load(model)
    return model.eval()


@torch.inference_mode()
def logits_of(model: Transformer, token_ids: list[int]) -> torch.Tensor:
    hidden_TD, _ = model(torch.tensor(token_ids), context_of(len(token_ids)))
    return model.lm_head(hidden_TD)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        merged |= load_file(path)
    return merged


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@EACH
def test_logits_are_those_of_the_equations(tmp_path, twin, config):
    tensors = save_twin(twin, tmp_path / "theirs", **config)
    expected = twin.logits(twin.config | config, tensors, TOKENS)
    from_hf(tmp_path / "theirs", tmp_path / "ours")
    for checkpoint in (open_hf(tmp_path / "theirs"), open_checkpoint(tmp_path / "ours")):
        assert_close(logits_of(loaded(checkpoint), TOKENS), expected)


def test_all_kinds_of_moe_plus_plus_experts_are_met(tmp_path):
    """Else the tests here would show little."""
    save_twin(MOE_PLUS_PLUS, tmp_path / "theirs")
    with torch.inference_mode():
        output = loaded(open_hf(tmp_path / "theirs"))(torch.tensor(TOKENS), context_of(len(TOKENS)))
    assert {expert for routing in output.routings for expert in routing.experts_TK.flatten().tolist()} == set(range(9))


@EACH
def test_greedy_texts_are_those_of_the_equations(tmp_path, twin, config):
    """64 tokens with the cache, from the folder as it lies."""
    tensors = save_twin(twin, tmp_path / "theirs", **config)
    engine = Engine(loaded(open_hf(tmp_path / "theirs")), (), ServeConfig(), "cpu", [LocalDispatcher()], Turns())
    engine.add(Request("one", TOKENS[:7], Sampling(max_tokens=64, temperature=0.0)))
    answer = []
    while engine.has_work:
        answer += [output.token_id for output in engine.step()]
    expected = TOKENS[:7]
    for _ in range(64):
        expected = [*expected, int(twin.logits(twin.config | config, tensors, expected)[-1].argmax())]
    assert TOKENS[:7] + answer == expected
    assert len(set(answer)) > 8, "a text that repeats itself shows little"


@EACH
def test_the_way_back_gives_the_same_bytes(tmp_path, twin, config):
    """But for the gate map of MoE++'s first layer, which nothing reads: zeros stand in its place."""
    before = save_twin(twin, tmp_path / "theirs", **config)
    done = from_hf(tmp_path / "theirs", tmp_path / "ours", shard_bytes=20_000)
    back = to_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=20_000)
    after = tensors_in(tmp_path / "back")
    assert before.keys() == after.keys()
    unused = {"model.layers.0.mlp.moe.gate.gate_map.weight"} & before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], torch.zeros_like(tensor) if name in unused else tensor), name
    assert done.skipped == ({"weights that nothing reads": 1} if unused else {})
    assert (done.parameters, done.active_parameters) == (back.parameters, back.active_parameters)
    assert done.parameters == sum(t.numel() for name, t in before.items() if name not in unused)
    assert max(done.peak_bytes, back.peak_bytes) <= max(t.nbytes for t in before.values())
    written, given = json.loads((tmp_path / "back" / "config.json").read_text()), twin.config | config
    other = {key for key in given if written.get(key) != given[key]}
    # What the model at hand has no use for: dense layers' width without any; a doubling that Mixtral's gate has not.
    assert other <= {"rope_scaling", "moe_expert_interval", "intermediate_size", "moe_feature_no_mul_topk"}
    assert open_hf(tmp_path / "back").config == open_hf(tmp_path / "theirs").config


def test_an_ffn_worker_reads_its_experts_out_of_the_stack(tmp_path):
    tensors = save_twin(STEP3, tmp_path / "theirs")
    checkpoint = open_hf(tmp_path / "theirs")
    pool = ExpertPool(checkpoint.config, 1, 4)
    for parameter in pool.parameters():
        parameter.data.fill_(torch.nan)
    checkpoint.load(pool)
    found = {name: view for weight in weights(pool) for name, view in weight.split(weight.parameter.detach()).items()}
    assert pool.held[1] == pool.held[2] == range(1, 3) and len(found) == 2 * 2 * 3
    for name, tensor in found.items():
        _, layer, _, _, expert, part, _ = name.split(".")
        assert torch.equal(tensor, tensors[f"model.layers.{layer}.moe.{part}.weight"][int(expert)])


def quantised(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], ...]:
    """Projections in FP8 with a factor for each block of 128 by 128, and what they stand for."""
    stored, meant = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        *stack, rows, columns = weight.shape
        factors = torch.rand(*stack, -(-rows // 128), -(-columns // 128)) + 0.5
        spread = factors.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
        stored[name] = weight.to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = factors
        meant[name] = (stored[name].float() * spread).bfloat16()
    return stored, meant


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_block_fp8_of_stacked_experts(tmp_path):
    """Experts of more than one block of rows, none of them a whole number: each has factors of its own."""
    config = STEP3.config | {"moe_intermediate_size": 200, "hidden_size": 136, "quantization_config": FP8}
    stored, meant = quantised(STEP3.tensors(config), config)
    save_twin(STEP3, tmp_path / "theirs", stored, **config)
    model = loaded(open_hf(tmp_path / "theirs"))
    expected = STEP3.logits(config, meant, TOKENS)
    assert_close(logits_of(model, TOKENS), expected, max_error=1e-4, rms_error=1e-5)
    done = from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert done.peak_bytes <= 128 * 200 * (1 + 4 + 2) + 4 * 200 + 16
    to_hf(tmp_path / "ours", tmp_path / "back")
    after = tensors_in(tmp_path / "back")
    assert all(torch.equal(after[name], tensor) for name, tensor in meant.items())


def test_fp8_blocks_that_a_cut_would_go_through(tmp_path):
    """MoE++'s fused matrix: the expert's second half begins within a block."""
    stored, _ = quantised(MOE_PLUS_PLUS.tensors(MOE_PLUS_PLUS.config), MOE_PLUS_PLUS.config)
    save_twin(MOE_PLUS_PLUS, tmp_path / "theirs", stored, quantization_config=FP8)
    with pytest.raises(CheckpointError, match="blocks of 128 rows would be cut apart at row 24"):
        open_hf(tmp_path / "theirs")


def test_step3_behind_its_vision_part(tmp_path):
    """As it is published: the text's config in a section, its tensors beside those that see."""
    text = {key: value for key, value in STEP3.config.items() if key != "architectures"}
    outer = {"model_type": "step3_vl", "text_config": text, "vision_config": {"hidden_size": 8}, "eos_token_id": [1, 5]}
    tensors = STEP3.tensors(STEP3.config)
    eyes = {
        "vision_model.embeddings.class_embedding": torch.zeros(1, 8),
        "vit_downsampler.weight": torch.zeros(8, 8, 2, 2),
        "vit_downsampler2.bias": torch.zeros(8),
        "vit_large_projector.weight": torch.zeros(32, 16),
    }
    folder = tmp_path / "theirs"
    save_twin(STEP3, folder, tensors | eyes)
    (folder / "config.json").write_text(json.dumps(outer))
    found = open_hf(folder)
    assert found.skipped == {"parts that are no language model": 4}
    assert_close(logits_of(loaded(found), TOKENS), STEP3.logits(STEP3.config, tensors, TOKENS))
    done = from_hf(folder, tmp_path / "ours")
    assert done.model_type == "step3_vl" and done.skipped == found.skipped
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text()) == {"eos_token_id": [1, 5]}
    assert to_hf(tmp_path / "ours", tmp_path / "back").model_type == "step3_text"
    (folder / "config.json").write_text(json.dumps(outer | {"text_config": None}))
    with pytest.raises(ValueError, match=r"config\.json: no section 'text_config'"):
        open_hf(folder)


DAMAGED: list[tuple[str, Twin, Any, str]] = [
    (
        "an expert too few in the stack",
        STEP3,
        lambda t: t.update({"model.layers.1.moe.up_proj.weight": t["model.layers.1.moe.up_proj.weight"][1:].clone()}),
        "model.layers.1.moe.up_proj.weight has shape [5, 24, 32], config.json says [6, 24, 32]",
    ),
    (
        "a router lost",
        STEP3,
        lambda t: t.pop("model.layers.2.moe.gate.weight"),
        "missing, such as model.layers.2.moe.gate",
    ),
    (
        "eyes where there are none",
        STEP3,
        lambda t: t.update({"vit_downsampler.weight": torch.zeros(1)}),
        "has not, such as vit_downsampler.weight",
    ),
    (
        "a gate map in a later layer lost",
        MOE_PLUS_PLUS,
        lambda t: t.pop("model.layers.1.mlp.moe.gate.gate_map.weight"),
        "missing, such as model.layers.1.mlp.moe.gate.gate_map.weight",
    ),
    (
        "a matrix that is not fused",
        MOE_PLUS_PLUS,
        lambda t: t.update({"model.layers.1.mlp.moe.experts.experts.0.up_proj.weight": torch.zeros(24, 32)}),
        "has shape [24, 32], config.json says [48, 32]",
    ),
    (
        "constants of two dtypes",
        MOE_PLUS_PLUS,
        lambda t: t.update({"model.layers.1.mlp.moe.experts.experts.5.constant": torch.zeros(32).half()}),
        "parts of layers.1.mlp.zero_computation.constant are F16 and F32",
    ),
]


@pytest.mark.parametrize("twin, change, told", [c[1:] for c in DAMAGED], ids=[c[0] for c in DAMAGED])
def test_no_tensor_is_lost_or_left_over_in_silence(tmp_path, twin, change, told):
    tensors = twin.tensors(twin.config)
    change(tensors)
    save_twin(twin, tmp_path / "theirs", tensors)
    with pytest.raises(ValueError) as refused:
        open_hf(tmp_path / "theirs")
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_the_first_gate_map_may_be_missing(tmp_path):
    tensors = MOE_PLUS_PLUS.tensors(MOE_PLUS_PLUS.config)
    del tensors["model.layers.0.mlp.moe.gate.gate_map.weight"]
    save_twin(MOE_PLUS_PLUS, tmp_path / "theirs", tensors)
    assert open_hf(tmp_path / "theirs").skipped == {}


YARN, NTK = {"rope_type": "yarn", "factor": 2.0}, {"type": "ntk", "factor": 4.0}
REFUSED: list[tuple[str, Twin, dict[str, Any], str]] = [
    ("several key heads", STEP3, {"num_attention_groups": 2}, "num_attention_groups is 2; supported for step3_text: 1"),
    ("layers that are not there", STEP3, {"moe_layers_enum": "3,4"}, "is '3,4'; supported: layers from 0 to 3"),
    ("layers that are no numbers", STEP3, {"moe_layers_enum": "all"}, "is 'all'; supported: layer numbers such as"),
    ("no layer with experts", STEP3, {"moe_layers_enum": []}, "is 'step3_text', which cannot hold dense layers only"),
    ("longer contexts", STEP3, {"rope_scaling": YARN}, "rope_scaling is {'rope_type': 'yarn'"),
    (
        "inputs that are not doubled",
        MOE_PLUS_PLUS,
        {"moe_feature_no_mul_topk": True},
        "moe_feature_no_mul_topk is True",
    ),
    ("dense layers", MOE_PLUS_PLUS, {"moe_expert_interval": 2}, "moe_expert_interval is 2; supported for MoE++: 1"),
    ("layers of several sizes", MOE_PLUS_PLUS, {"num_experts": [9, 12]}, "num_experts is [9, 12]; supported: one"),
    ("no FFN expert", MOE_PLUS_PLUS, {"num_experts": [4]}, "num_experts is [4]"),
    ("longer contexts, by another way", MOE_PLUS_PLUS, {"rope_scaling": NTK}, "rope_scaling is {'type': 'ntk'"),
]


@pytest.mark.parametrize("twin, changes, told", [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_what_is_not_computed_is_refused(twin, changes, told):
    family_of(twin.config).to_model_config(twin.config)  # as it is, it is read
    with pytest.raises(ValueError) as refused:
        family_of(twin.config).to_model_config(twin.config | changes)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_published_sizes():
    """Step-3: 316 billion parameters, 38 of them active (arXiv 2507.19427, table 1). MoE++ 7B: arXiv 2410.07348."""
    step3 = STEP3.config | {
        "vocab_size": 128_815,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "head_dim": 256,
        "share_q_dim": 2048,
        "moe_num_experts": 48,
        "moe_intermediate_size": 5120,
        "share_expert_dim": 5120,
        "moe_layers_enum": ",".join(map(str, range(4, 60))),
    }
    config = family_of(step3).to_model_config(step3)
    assert config.dense_layers == (0, 1, 2, 3, 60)
    assert (config.num_params() // 10**9, config.num_active_params() // 10**9) == (316, 38)
    seven = MOE_PLUS_PLUS.config | {
        "vocab_size": 65_536,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "num_experts": [20],
    }
    config = family_of(seven).to_model_config(seven)
    assert config.num_params() / 1e9 == pytest.approx(7.68, abs=0.02)
    assert choose_family(config).model_type == "MoE++"
