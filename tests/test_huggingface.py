"""Hugging Face's own classes are the twin: the same logits and texts after a conversion, the same bytes after two.

And nothing is lost in silence: every tensor of a checkpoint is taken over, known to carry nothing, or an error.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from commands import environment, expertmesh, expertmesh_json
from foreign import CONTEXT, EACH_FAMILY, MODELS, VOCAB_SIZE, save_hf_model
from numerics import assert_close
from safetensors.torch import load_file, save_file
from tiny import context_of, tiny_model

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.timeline import Turns
from expertmesh.system.convert.huggingface import Conversion, from_hf, tensor_shapes, to_hf
from expertmesh.system.model.checkpoint import INDEX, Checkpoint, open_checkpoint, read_config, write_config
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.engine import Engine
from expertmesh.system.serve.request import Request, Sampling
from expertmesh.system.tokenizer import Tokenizer

PROMPTS = [[5, 17, 3, 80, 41, 2, 2, 66, 9, 31], [96, 0, 33]]  # one longer than the sliding windows, one shorter


class Pair(NamedTuple):
    """A model of Hugging Face, the folder it was saved to, and what became of that."""

    theirs: Any
    folder: Path
    ours: Path
    done: Conversion


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp("pair")
            theirs = save_hf_model(name, folder / "theirs")
            done = from_hf(folder / "theirs", folder / "ours", shard_bytes=60_000)
            made[name] = Pair(theirs, folder / "theirs", folder / "ours", done)
        return made[name]

    return pair


def load(folder: Path) -> Transformer:
    return loaded(open_checkpoint(folder))


def loaded(checkpoint: Checkpoint) -> Transformer:
    model = Transformer(checkpoint.config)
    checkpoint.load(model)
    return model.eval()


@torch.inference_mode()
def logits_of(model: Transformer, token_ids: list[int]) -> torch.Tensor:
    length = len(token_ids)
    hidden_TD, _ = model(torch.tensor(token_ids), context_of(length))
    return model.lm_head(hidden_TD)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        merged |= load_file(path)
    return merged


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(pairs, name):
    pair = pairs(name)
    torch.manual_seed(2)
    token_ids = torch.randint(VOCAB_SIZE, (48,)).tolist()
    with torch.inference_mode():
        expected = pair.theirs(torch.tensor([token_ids])).logits[0]
    assert_close(logits_of(load(pair.ours), token_ids), expected, what=name)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_texts_are_those_of_transformers(pairs, name):
    """64 tokens with the cache, two requests in one batch."""
    pair = pairs(name)
    engine = Engine(load(pair.ours), (), ServeConfig(max_running=2), "cpu", [LocalDispatcher()], Turns())
    answers: dict[str, list[int]] = {}
    for number, prompt in enumerate(PROMPTS):
        answers[str(number)] = []
        engine.add(Request(str(number), prompt, Sampling(max_tokens=64, temperature=0.0)))
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id].append(output.token_id)
    for prompt, answer in zip(PROMPTS, answers.values(), strict=True):
        expected = pair.theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        assert prompt + answer == expected[0].tolist()
        assert len(set(answer)) > 8, "a text that repeats itself shows little"


@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_gives_the_same_bytes_and_a_model_that_loads(pairs, name, tmp_path):
    pair = pairs(name)
    done = to_hf(pair.ours, tmp_path / "back")
    before, after = tensors_in(pair.folder), tensors_in(tmp_path / "back")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert tensor.dtype == after[tensor_name].dtype and torch.equal(tensor, after[tensor_name]), tensor_name
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, dtype="auto"
    )
    assert type(loaded) is type(pair.theirs) and loaded.dtype == torch.float32
    assert not any(info.values()), info
    with torch.inference_mode():
        assert_close(loaded(torch.tensor(PROMPTS[:1])).logits, pair.theirs(torch.tensor(PROMPTS[:1])).logits)
    assert done == Conversion(**{**vars(pair.done), "checkpoint": tmp_path / "back"})


@pytest.mark.parametrize("name", EACH_FAMILY.values(), ids=EACH_FAMILY)
def test_what_a_conversion_says_of_itself(pairs, name):
    pair = pairs(name)
    stored = tensors_in(pair.ours)
    assert pair.done.checkpoint == pair.ours and pair.done.model_type == MODELS[name][0]
    assert pair.done.tensors == len(stored) == len(tensors_in(pair.folder))
    buffers = sum(tensor.numel() for key, tensor in pair.theirs.named_buffers() if "e_score_correction_bias" in key)
    assert pair.done.parameters == pair.theirs.num_parameters() + buffers
    assert pair.done.parameters == sum(tensor.numel() for tensor in stored.values())
    assert pair.done.active_parameters <= pair.done.parameters
    assert pair.done.peak_bytes == max(tensor.nbytes for tensor in stored.values())
    assert len(list(pair.ours.glob("*.safetensors"))) > 1
    assert json.loads((pair.ours / "config.json").read_text())["torch_dtype"] == "float32"


def copied(pair: Pair, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """Their checkpoint in one file, its tensors and config changed."""
    shutil.copytree(pair.folder, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_in(pair.folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(content))
    return folder


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]
DAMAGED: list[tuple[str, str, Change, str]] = [
    ("a lost expert", "olmoe", lambda t: t.pop(EXPERT), f"1 of 96 tensors are missing, such as {EXPERT}"),
    (
        "an expert too many",
        "olmoe",
        lambda t: t.update({EXPERT.replace(".5.", ".6."): t[EXPERT].clone()}),
        "model.safetensors: 1 tensors that the architecture in config.json has not, such as "
        + EXPERT.replace(".5.", ".6."),
    ),
    (
        "a layer too many",
        "llama",
        lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(2)}),
        "such as model.layers.3.mlp.up_proj.weight",
    ),
    (
        "a bias that nobody has",
        "llama",
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
        "such as model.layers.0.self_attn.q_proj.bias",
    ),
    (
        "another width",
        "olmoe",
        lambda t: t.update({EXPERT: t[EXPERT][:-1].clone()}),
        f"{EXPERT} has shape [47, 32], config.json says [48, 32]",
    ),
    (
        "FP8 without factors",
        "olmoe",
        lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
        f"{EXPERT} is F8_E4M3 without factors",
    ),
    (
        "FP8 with factors of other blocks",
        "olmoe",
        lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn), EXPERT + "_scale_inv": torch.ones(2, 1)}),
        f"{EXPERT}_scale_inv is not F32 [1, 1]",
    ),
    (
        "factors of what is not FP8",
        "olmoe",
        lambda t: t.update({EXPERT + "_scale_inv": torch.ones(1, 1)}),
        f"such as {EXPERT}_scale_inv",
    ),
    ("whole numbers", "olmoe", lambda t: t.update({EXPERT: t[EXPERT].int()}), f"{EXPERT} is I32"),
]


@pytest.mark.parametrize("family, change, told", [c[1:] for c in DAMAGED], ids=[c[0] for c in DAMAGED])
def test_no_tensor_is_lost_or_left_over_in_silence(pairs, tmp_path, family, change, told):
    source = copied(pairs(EACH_FAMILY[family]), tmp_path / "source", change)
    with pytest.raises(ValueError) as refused:
        from_hf(source, tmp_path / "place" / "out")
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "place").exists()


def test_what_carries_nothing_is_left_out_and_counted(pairs, tmp_path):
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(2) for layer in range(3)}
        tensors |= {f"model.layers.3.{name}": torch.ones(2) for name in ("eh_proj.weight", "enorm.weight")}

    pair = pairs(EACH_FAMILY["deepseek_v3"])
    source = copied(pair, tmp_path / "source", add, num_nextn_predict_layers=1)
    done = from_hf(source, tmp_path / "out")
    assert done.skipped == {"tables of rotary frequencies": 3, "layers that predict further tokens": 2}
    assert {k: v for k, v in vars(done).items() if k not in ("skipped", "checkpoint")} == {
        k: v for k, v in vars(pair.done).items() if k not in ("skipped", "checkpoint")
    }
    source = copied(pair, tmp_path / "none", add, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"2 tensors that .* such as model.layers.3.eh_proj.weight"):
        from_hf(source, tmp_path / "never")


def test_a_tied_head_may_be_stored_but_must_be_the_embedding(pairs, tmp_path):
    pair = pairs("llama: biases, wide heads, tied")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    same = copied(pair, tmp_path / "same", lambda t: t.update({head: t[embedding].clone()}))
    assert from_hf(same, tmp_path / "out").skipped == {"copies of tied embeddings": 1}
    other = copied(pair, tmp_path / "other", lambda t: t.update({head: t[embedding] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        from_hf(other, tmp_path / "never")


def test_block_fp8_becomes_bfloat16(pairs, tmp_path):
    """As DeepSeek-V3 is published: projections in FP8 with factors, norms, router and embeddings as they are."""
    expected: dict[str, torch.Tensor] = {}

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            factor = tensors[name].abs().max().reshape(1, 1) / 448
            tensors[name] = (tensors[name] / factor).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = factor
            expected[name] = (tensors[name].float() * factor).bfloat16()

    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    pair = pairs(EACH_FAMILY["deepseek_v3"])
    source = copied(pair, tmp_path / "source", quantise, quantization_config=fp8)
    done = from_hf(source, tmp_path / "out")
    assert (done.tensors, done.parameters) == (pair.done.tensors, pair.done.parameters)
    to_hf(tmp_path / "out", tmp_path / "back")
    before, after = tensors_in(pair.folder), tensors_in(tmp_path / "back")
    assert len(expected) > 50
    for name, tensor in before.items():
        assert torch.equal(after[name], expected.get(name, tensor)), name
    token_ids = PROMPTS[0]
    whole, rounded = logits_of(load(pair.ours), token_ids), logits_of(load(tmp_path / "out"), token_ids)
    assert_close(rounded, whole, max_error=0.5, rms_error=0.2)  # another model by its rounding, and still that one


def test_a_model_made_here_loads_in_transformers(tmp_path):
    """Its end of text is known from the tokenizer alone, and it has no default of the family."""
    moe = {"zero_experts": 0, "copy_experts": 0, "constant_experts": 0, "gating_residual": False}
    config = tiny_model(moe={**moe, "gate_mode": "mixtral"})
    ours = tmp_path / "ours"
    tokenizer = Tokenizer.train(iter(["import torch", "def f(x): return x"]), config.vocab_size or 0)
    tokenizer.save(ours)
    torch.manual_seed(4)
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in tensor_shapes(config).items()}
    save_file(tensors, ours / "model.safetensors")
    (ours / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    write_config(ours, config)
    done = to_hf(ours, tmp_path / "theirs")
    assert done.model_type == "mixtral"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id) == (tokenizer.eos_id, None)
    with torch.inference_mode():
        expected = theirs(torch.tensor(PROMPTS[:1])).logits[0]
    assert_close(logits_of(load(ours), PROMPTS[0]), expected)
    encoded = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")("def f(x)").input_ids
    assert encoded == tokenizer.encode("def f(x)")


def test_token_ids_of_the_config_find_a_place(pairs, tmp_path):
    """Ours has none for them; the tokenizer reads generation_config.json."""

    def same(tensors: dict[str, torch.Tensor]) -> None:
        pass

    source = copied(pairs("mixtral"), tmp_path / "source", same, eos_token_id=[7, 9], bos_token_id=1)
    (source / "generation_config.json").unlink(missing_ok=True)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    from_hf(source, tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [7, 9], "bos_token_id": 1}
    to_hf(tmp_path / "out", tmp_path / "back")
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert [content[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id")] == [[7, 9], 1, None]
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("verb", ["from-hf", "to-hf"])
def test_the_command(pairs, tmp_path, verb):
    pair = pairs(EACH_FAMILY["deepseek_v3"])
    source = pair.folder if verb == "from-hf" else pair.ours
    told = expertmesh_json("convert", verb, source, "out", folder=tmp_path)
    keys = ("parameters", "active_parameters", "tensors", "peak_bytes", "skipped", "model_type")
    assert told == {key: vars(pair.done)[key] for key in keys} | {"checkpoint": str(tmp_path / "out")}
    again = expertmesh("convert", verb, source, "out", folder=tmp_path)
    (line,) = again.stderr.strip().splitlines()
    assert again.returncode == 2 and line.startswith("expertmesh: out exists and is not an empty folder")


WRONG: list[tuple[str, Callable[[Path, Path], Any], str]] = [
    ("ours, taken in", lambda ours, theirs: from_hf(ours, theirs / "out"), "is a checkpoint of expertmesh already"),
    ("theirs, taken out", lambda ours, theirs: to_hf(theirs, theirs / "out"), "model_type is 'mixtral', expected"),
    ("nothing there", lambda ours, theirs: from_hf(ours / "no", theirs / "out"), "give one that holds a Hugging Face"),
    ("not a checkpoint", lambda ours, theirs: from_hf(ours.parent, theirs / "out"), "no config.json"),
]


@pytest.mark.parametrize("call, told", [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_the_wrong_folder(pairs, call, told):
    pair = pairs("mixtral")
    with pytest.raises(ValueError, match=told):
        call(pair.ours, pair.folder)


def test_a_refusal_names_the_file(pairs, tmp_path):
    source = copied(pairs("mixtral"), tmp_path / "source", lambda tensors: None, hidden_act="gelu")
    with pytest.raises(ValueError, match=r"source/config\.json: hidden_act is 'gelu'"):
        from_hf(source, tmp_path / "out")


# The high-water mark of this process's own memory: ru_maxrss would begin with that of the process which started it.
MEASURED = """
import json, sys
from pathlib import Path
from expertmesh.system.convert.huggingface import from_hf, tensor_shapes
from expertmesh.system.model.config import ModelConfig

def high_water():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

source, out = map(Path, sys.argv[1:])
tensor_shapes(ModelConfig(vocab_size=2, layers=1, hidden_size=8))  # torch imports much when a model is first described
before = high_water()
done = from_hf(source, out)
print(json.dumps({"grown": high_water() - before, "peak_bytes": done.peak_bytes, "parameters": done.parameters}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_below_the_largest_tensor(tmp_path):
    """A checkpoint of 300 MB whose largest tensor has 67 MB."""
    config = {
        "model_type": "llama",
        "vocab_size": 32_768,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
    }
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    attention = {f"self_attn.{part}_proj": (1024, 1024) for part in "qkvo"}
    dense = {"mlp.gate_proj": (4096, 1024), "mlp.up_proj": (4096, 1024), "mlp.down_proj": (1024, 4096)}
    norms = {"input_layernorm": (1024,), "post_attention_layernorm": (1024,)}
    layers = [f"model.layers.{layer}.{part}" for layer in range(5) for part in (attention | dense | norms)]
    shapes = dict(zip(layers, list((attention | dense | norms).values()) * 5, strict=True))
    shapes |= {"model.embed_tokens": (32_768, 1024), "lm_head": (32_768, 1024), "model.norm": (1024,)}
    names = list(shapes)
    weight_map = {}
    for number in range(4):
        part = {f"{name}.weight": torch.randn(shapes[name]).bfloat16() for name in names[number::4]}
        save_file(part, source / f"model-{number}.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    largest = 2 * 32_768 * 1024
    assert sum(path.stat().st_size for path in source.iterdir()) > 4 * largest

    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["peak_bytes"] <= largest and measured["grown"] <= largest, measured
    assert read_config(tmp_path / "out").num_params() == measured["parameters"]
    before, after = tensors_in(source), tensors_in(tmp_path / "out")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name.removeprefix("model.")]), name
