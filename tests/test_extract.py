"""A nested checkpoint cut to a smaller one: it says exactly what the large one says at that width."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import expertmesh, expertmesh_json
from safetensors.torch import load_file
from tiny import VOCAB_SIZE, context_of, tiny_model, write_random_checkpoint

from expertmesh.system.convert import stream
from expertmesh.system.convert.extract import extract
from expertmesh.system.model.checkpoint import CheckpointError, load_weights, read_config
from expertmesh.system.model.transformer import Transformer

SHARES = (0.25, 0.5, 1)
CONFIG = tiny_model(
    moe={"expert": {"hidden_size": 32, "nested": SHARES}, "shared": {"hidden_size": 24}},
    dense_layers=(1,),
    dense={"hidden_size": 40, "nested": SHARES},
)
TOKENIZER = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "x"}'}


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """Its tokenizer is there to be copied, not to be used."""
    tokenizer = tmp_path / "data" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for name, content in TOKENIZER.items():
        (tokenizer / name).write_text(content)
    return write_random_checkpoint(tmp_path, CONFIG)


@torch.inference_mode()
def logits(folder: Path, width: float = 1.0) -> torch.Tensor:
    model = Transformer(read_config(folder))
    load_weights(model, folder)
    tokens_T = torch.randint(0, VOCAB_SIZE, (18,), generator=torch.Generator().manual_seed(0))
    return model.lm_head(model(tokens_T, context_of(9, sequences=2, width=width)).hidden_TD)


@pytest.mark.parametrize("chunk", [stream.CHUNK_BYTES, 200], ids=["whole tensors", "pieces of a row or two"])
@pytest.mark.parametrize("share", SHARES)
def test_logits_are_those_of_the_large_model_at_that_width(nested, tmp_path, monkeypatch, share, chunk):
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
    done = extract(nested, tmp_path / "small", share, shard_bytes=60_000)
    assert torch.equal(logits(tmp_path / "small"), logits(nested, share))
    config = read_config(tmp_path / "small")
    assert (config.moe.expert.hidden_size, config.dense.hidden_size) == (32 * share, 40 * share)
    assert config.nested_shares == () and config.moe.shared.hidden_size == 24, "a shared expert is not nested"
    assert (done.parameters, done.active_parameters) == (config.num_params(), config.num_active_params())
    for name, content in TOKENIZER.items():
        assert (done.checkpoint / name).read_text() == content
    if chunk == 200:
        assert done.peak_bytes < 2 * 40 * 4 + 200, "a row of the source, and what is kept of it, at least"


def test_what_is_not_nested_is_copied_byte_for_byte(nested, tmp_path):
    extract(nested, tmp_path / "small", 0.5)
    large, small = (
        {k: v for f in p.glob("*.safetensors") for k, v in load_file(f).items()} for p in (nested, tmp_path / "small")
    )
    assert large.keys() == small.keys()
    cut = [name for name, tensor in large.items() if tensor.shape != small[name].shape]
    assert len(cut) == 3 * (2 * 4 + 1) and all(".mlp." in name and "shared" not in name for name in cut)
    for name, tensor in small.items():
        rows, *columns = tensor.shape
        first = large[name][:rows]
        assert torch.equal(tensor, first[:, : columns[0]] if columns else first), name


def edit(folder: Path, change: dict[str, Any]) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))


def test_what_is_refused(nested, tmp_path):
    out = tmp_path / "small"
    with pytest.raises(ValueError, match=r"--width 0.3: .* was not trained for it; shares are 0.25, 0.5, 1$"):
        extract(nested, out, 0.3)
    plain = tmp_path / "plain"
    shutil.copytree(nested, plain)
    edit(plain, {"moe": {"expert": {"hidden_size": 32}, "shared": {"hidden_size": 24}}, "dense": {"hidden_size": 40}})
    with pytest.raises(ValueError, match="was not trained for it; no part of it is nested$"):
        extract(plain, out, 0.5)
    edit(nested, {"hidden_size": 48})
    with pytest.raises(CheckpointError, match="has shape"):
        extract(nested, out, 0.5)
    assert not out.exists()


def test_the_verb(nested, tmp_path):
    result = expertmesh_json("convert", "extract", nested, "small", "--width", "0.5", folder=tmp_path)
    assert result.keys() >= {"checkpoint", "parameters", "active_parameters", "tensors", "peak_bytes"}
    assert Path(result["checkpoint"]) == tmp_path / "small"
    assert result["parameters"] == read_config(tmp_path / "small").num_params()
    refused = expertmesh("convert", "extract", nested, "other", "--width", "0.6", folder=tmp_path)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "0.25, 0.5, 1" in refused.stderr
