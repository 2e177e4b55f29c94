"""A folder of Hugging Face is used as it lies: generated from, served, trained from; transformers is the twin."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from commands import expertmesh, expertmesh_json
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.launch.door import build_app
from expertmesh.launch.find_checkpoint import find_checkpoint
from expertmesh.launch.recipe import load_recipe
from expertmesh.launch.serving import bring_up, look_at
from expertmesh.launch.train_job import find_start
from expertmesh.system.model.checkpoint import OwnCheckpoint
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.workers import serving_dtype
from expertmesh.system.tokenizer import Tokenizer
from expertmesh.system.train.dataset import TokenDataset

PROMPT = "The import statement"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
)
TRAIN = """
name: tuned
start_from: theirs
parallel: {dp: 2, ep: 2}
data: {max_bytes: 300_000}
train: {steps: 4, batch_size: 16, sequence_length: 32, learning_rate: 5.0e-3, warmup_steps: 1, validate_every: 2,
        checkpoint_every: 2, validation_batches: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `theirs`, a Qwen3-MoE in bfloat16 with a chat template, its vocabulary longer than the tokenizer's."""
    folder = tmp_path_factory.mktemp("user")
    theirs = folder / "theirs"
    prepare_tiny_data(folder / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "run" / "data" / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # wide enough to say different things
    model.bfloat16().save_pretrained(theirs, max_shard_size="50KB")
    tokenizer.save_pretrained(theirs)
    return folder


@pytest.fixture(scope="module")
def twin(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "theirs", dtype=torch.float32)


def greedy(twin: Any, prompt: list[int], tokens: int) -> list[int]:
    return twin.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)[0].tolist()[len(prompt) :]


@pytest.mark.parametrize("pools", [(), ("--attention", "1", "--ffn", "2")], ids=["joined", "split"])
def test_generate_says_what_transformers_says(folder, twin, pools):
    told = expertmesh_json("generate", "theirs", "--prompt", PROMPT, "--max-tokens", "40", *pools, folder=folder)
    assert told["prompt_token_ids"] == Tokenizer.load(folder / "theirs").encode(PROMPT)
    assert told["token_ids"] == greedy(twin, told["prompt_token_ids"], 40)
    assert len(set(told["token_ids"])) > 8
    assert sorted(path.name for path in folder.iterdir()) == ["run", "theirs"], "nothing is copied"


def test_chat_goes_through_their_template(folder, twin):
    """Over HTTP, without a socket: the door on the engine that `serve` brings up."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "theirs")
    messages = [{"role": "user", "content": "What is a tuple?"}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = theirs(text, add_special_tokens=False).input_ids
    expected = theirs.decode(greedy(twin, prompt, 24), skip_special_tokens=True)
    served = look_at(folder / "theirs")

    async def ask() -> dict[str, Any]:
        async with bring_up(served, None, ServeConfig()) as service:
            transport = httpx.ASGITransport(build_app(service.client, served.tokenizer, served.name))
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as http:
                body = {"model": "theirs", "messages": messages, "max_tokens": 24, "temperature": 0}
                return (await http.post("/v1/chat/completions", json=body, timeout=60)).json()

    answer = asyncio.run(ask())
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def first_loss(twin: Any, folder: Path) -> float:
    """What transformers says of the first batch, without a step of training."""
    tokens_BS1 = TokenDataset(folder / "runs" / "tuned" / "data").batch(0, 16, 32, 0)
    with torch.inference_mode():
        logits = twin(tokens_BS1[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BS1[:, 1:].flatten()).item()


def test_training_starts_from_it_and_goes_on_without_it(folder, twin, tmp_path):
    shutil.copytree(folder / "theirs", tmp_path / "theirs")
    (tmp_path / "recipe.yaml").write_text(TRAIN)
    whole = expertmesh_json("train", "recipe.yaml", folder=tmp_path)
    assert whole["losses"][0] == pytest.approx(first_loss(twin, tmp_path), rel=1e-5)
    assert max(whole["losses"][1:]) < whole["losses"][0]
    checkpoint = Path(whole["checkpoint"])
    trained = find_checkpoint(tmp_path / "runs" / "tuned")
    assert trained.config == find_checkpoint(folder / "theirs").config and trained.dtype == "float32"
    assert Tokenizer.load(checkpoint).fingerprint == Tokenizer.load(folder / "theirs").fingerprint
    assert "[assistant]" in Tokenizer.load(checkpoint).render_chat([{"role": "user", "content": "hi"}])

    weights = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    shutil.rmtree(checkpoint.resolve())  # as if it had been killed after step 2
    shutil.rmtree(tmp_path / "theirs")
    resumed = expertmesh_json("train", "recipe.yaml", folder=tmp_path)
    assert [event["what"] for event in resumed["events"]].count("resumed") == 1
    assert resumed["losses"] == whole["losses"] and resumed["validation_loss"] == whole["validation_loss"]
    assert {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")} == weights


WRONG: list[tuple[str, tuple[str, ...], str]] = [
    ("no folder", ("generate", "nowhere", "--prompt", "x"), "no checkpoint folder nowhere"),
    ("not a checkpoint", ("generate", "run", "--prompt", "x"), "no config.json, so this is not a checkpoint folder"),
    ("a model that is not computed", ("serve", "other", "--port", "0"), "model_type is 'gpt_oss'; supported: mixtral"),
    ("a tensor lost", ("generate", "damaged", "--prompt", "x"), "the file is missing"),
    ("training from nowhere", ("train", "recipe.yaml", "start_from=nowhere"), "no checkpoint folder nowhere"),
]


@pytest.mark.parametrize("words, told", [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_input_is_one_line(folder, tmp_path, words, told):
    (tmp_path / "run").mkdir()
    for name in ("other", "damaged"):
        shutil.copytree(folder / "theirs", tmp_path / name)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "gpt_oss"}))
    next((tmp_path / "damaged").glob("*-00002-of-*.safetensors")).unlink()
    (tmp_path / "recipe.yaml").write_text(TRAIN)
    done = expertmesh(*words, folder=tmp_path)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("expertmesh: ") and told in line


DOES_NOT_FIT: list[tuple[str, list[str], str]] = [
    ("sequences beyond its context", ["train.sequence_length=200"], "is longer than model.context_length=128"),
    ("ranks that its experts do not fill", ["parallel={dp: 4, ep: 4}"], "model.moe.ffn_experts=6: parallel.ep=4"),
    ("itself", ["name=theirs", "run_dir={folder}/theirs"], "lies in the run's own folder; give another name="),
]


@pytest.mark.parametrize("changes, told", [case[1:] for case in DOES_NOT_FIT], ids=[case[0] for case in DOES_NOT_FIT])
def test_a_recipe_that_does_not_fit_the_checkpoint(folder, tmp_path, changes, told):
    (tmp_path / "recipe.yaml").write_text(TRAIN)
    changes = [f"start_from={folder}/theirs", f"run_dir={tmp_path}/run", *changes]
    recipe = load_recipe(str(tmp_path / "recipe.yaml"), [change.replace("{folder}", str(folder)) for change in changes])
    with pytest.raises(ValueError) as refused:
        find_start(recipe, fresh=False)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_what_was_found_can_be_sent_to_a_worker(folder):
    theirs = find_checkpoint(folder / "theirs")
    for checkpoint in (theirs, find_checkpoint(write_random_checkpoint(folder / "run", tiny_model()))):
        sent = pickle.loads(pickle.dumps(checkpoint))
        assert sent == checkpoint
        one, other = Transformer(checkpoint.config), Transformer(checkpoint.config)
        checkpoint.load(one)
        sent.load(other)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert isinstance(checkpoint, OwnCheckpoint) and checkpoint.dtype == "float32"
    assert theirs.dtype == "bfloat16"
    assert [serving_dtype(theirs, device) for device in ("cpu", "cuda:1")] == [torch.float32, torch.bfloat16]
