"""The command as a user meets it: generate joined and split, serve, and what it says of wrong input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from commands import environment, expertmesh, expertmesh_json, start_expertmesh

HEAVY = {"torch", "ray", "deepspeed", "triton", "fastapi", "tokenizers"}


@pytest.mark.parametrize(
    "words, heavy, told",
    [
        (["--help"], HEAVY | {"pydantic", "yaml"}, "train"),
        (["train", "quickstart", "train.step=3"], HEAVY, "did you mean steps?"),
        (["train", "quickstart", "model.moe.ffn_experts=5"], HEAVY, "parallel.ep=2 does not divide"),
        (["status", "nowhere"], HEAVY, "no run of that name"),
    ],
    ids=["help", "an unknown key", "a split that does not fit", "status"],
)
def test_what_needs_no_heavy_library_waits_for_none(words, heavy, told, tmp_path):
    program = (
        "import sys, expertmesh.launch.cli as cli\n"
        f"try: cli.app({words})\n"
        "except SystemExit: pass\n"
        f"print('LOADED', sorted({heavy} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert "LOADED []" in done.stdout
    assert told in done.stdout + done.stderr


@pytest.fixture(scope="module")
def joined(folder: Path, trained: dict[str, Any]) -> dict[str, Any]:
    return expertmesh_json(*GREEDY, folder=folder)


GREEDY = ("generate", "runs/tiny", "--prompt", "The import statement", "--max-tokens", "40", "--temperature", "0")


def test_generate_answers_joined(joined):
    assert set(joined) >= {"text", "token_ids", "prompt_token_ids", "finish_reason", "pools"}
    assert len(joined["token_ids"]) == 40 and joined["finish_reason"] == "length"


@pytest.mark.parametrize("pools", [("1", "2", "1"), ("2", "1", "3")], ids=["1:2", "2:1 in three micro-batches"])
def test_generate_split_says_the_same(folder, joined, pools):
    attention, ffn, micro_batches = pools
    sizes = ("--attention", attention, "--ffn", ffn, "--micro-batches", micro_batches)
    trace = folder / f"trace-{attention}-{ffn}.json"
    split = expertmesh_json(*GREEDY, "serve.page_size=8", *sizes, "--trace", trace, folder=folder)
    events = json.loads(trace.read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"attention 0", *(f"ffn {f}" for f in range(int(ffn)))} <= tracks
    assert {name for name in split["stages"] if name.startswith("ffn")} == {f"ffn {f}" for f in range(int(ffn))}
    assert all(0 <= stage.get("bubble", 0) <= 1 for stage in split["stages"].values())
    assert split["pools"] == {"attention": int(attention), "ffn": int(ffn)}
    assert (split["token_ids"], split["text"]) == (joined["token_ids"], joined["text"])


@pytest.mark.parametrize("pools", [[], ["--attention", "1", "--ffn", "1"]], ids=["joined", "split 1:1"])
def test_the_openai_client_is_answered(folder, joined, pools):
    server = start_expertmesh("serve", "runs/tiny", "--port", "0", "--json", *pools, folder=folder)
    try:
        ready = json.loads(server.stdout.readline())
        client = openai.OpenAI(base_url=ready["base_url"], api_key="none", max_retries=0, timeout=60)
        (model,) = client.models.list()
        assert model.id == ready["model"] == "tiny"
        ask = {"model": "tiny", "prompt": "The import statement", "max_tokens": 40, "temperature": 0}
        assert client.completions.create(**ask).choices[0].text == joined["text"]
        chunks = list(client.completions.create(**ask, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == joined["text"]
        messages = [{"role": "user", "content": "What does import do?"}]
        chat = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**chat).choices[0].message.content
        deltas = client.chat.completions.create(**chat, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in deltas) == whole
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert server.returncode in (0, 130), errors


def damaged(trained: dict[str, Any], folder: Path) -> Path:
    """A copy of the trained checkpoint whose second weight file is cut short."""
    copy = folder / "damaged"
    if not copy.exists():
        shutil.copytree(Path(trained["checkpoint"]).resolve(), copy)
        weights = copy / "model-00002-of-00002.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    return copy


WRONG = [
    ("an unknown key", ["train", "tiny.yaml", "train.step=3"], "did you mean steps?"),
    ("experts not divisible", ["train", "tiny.yaml", "model.moe.ffn_experts=5"], "parallel.ep=2 does not divide"),
    ("no such data", ["train", "tiny.yaml", "data.source=/no/such/place", "name=x"], "/no/such/place does not exist"),
    ("too little data", ["train", "tiny.yaml", "data.source=short.txt", "name=y"], "tokens"),
    ("no such recipe", ["train", "no-such-recipe"], "no recipe 'no-such-recipe'"),
    ("settings of a run changed", ["train", "tiny.yaml", "train.seed=5", "train.steps=40"], "train.seed=0"),
    ("no such checkpoint", ["generate", "nowhere", "--prompt", "x"], "no checkpoint folder nowhere"),
    ("a folder without a checkpoint", ["generate", "runs", "--prompt", "x"], "config.json"),
    ("an empty prompt", ["generate", "runs/tiny", "--prompt", ""], "--prompt is empty"),
    ("a prompt beyond the context", ["generate", "runs/tiny", "--prompt", "import " * 300], "context holds 96"),
    (
        "drafts of a model without nested networks",
        ["generate", "runs/tiny", "--prompt", "x", "serve.drafts=nested"],
        "serve.drafts=nested: no network of this model is nested",
    ),
    ("more FFN workers than experts", ["generate", "runs/tiny", "--prompt", "x", "--ffn", "9"], "--ffn 9"),
    (
        "an unknown setting",
        ["generate", "runs/tiny", "serve.step_token=3", "--prompt", "x"],
        "did you mean step_tokens",
    ),
    (
        "a prompt beyond the cache",
        ["generate", "runs/tiny", "serve.cache_tokens=16", "--prompt", "a " * 60],
        "holds 16",
    ),
    ("a trace that is a folder", ["generate", "runs/tiny", "--prompt", "x", "--trace", "runs"], "--trace runs"),
    ("a trace in no folder", ["serve", "runs/tiny", "--port", "0", "--trace", "no/t.json"], "--trace no/t.json"),
    ("an empty pool", ["generate", "runs/tiny", "--prompt", "x", "--attention", "0"], "at least one"),
    ("a dashboard that is not there", ["submit", "tiny.yaml", "--address", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ("a job that is over", ["scale", "tiny", "--experts-parallel", "4"], "nothing trains in"),
    ("a drill on a worker that is not there", ["train", "tiny.yaml", "chaos.kill=trainer:2@step=1"], "no trainer 2"),
    ("a policy that is not known", ["train", "tiny.yaml", "fault.policy=pray"], "fault.policy=pray"),
    ("no such run", ["status", "nowhere"], "nowhere: no run of that name"),
    ("a log that is not there", ["logs", "tiny", "--rank", "trainer:7"], "--rank trainer:7: no log"),
    ("an address without http", ["submit", "tiny.yaml", "--address", "here"], "--address 'here'"),
]


@pytest.mark.parametrize("words, told", [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_input_is_one_line_and_exit_code_2(folder, trained, words, told):
    done = expertmesh(*words, folder=folder)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("expertmesh: ") and told in line


@pytest.mark.parametrize("verb", [["generate", "--prompt", "x"], ["serve", "--port", "0"]], ids=["generate", "serve"])
def test_a_truncated_checkpoint_is_named(folder, trained, verb):
    name, *options = verb
    done = expertmesh(name, damaged(trained, folder), *options, folder=folder)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "model-00002-of-00002.safetensors: truncated or damaged" in line


def test_a_refused_run_leaves_nothing_behind(folder, trained):
    assert not (folder / "runs" / "x").exists()


def test_doctor_finds_nothing_missing_here(folder):
    findings = expertmesh_json("doctor", folder=folder)["findings"]
    assert all(finding["ok"] for finding in findings if finding["needed"])
