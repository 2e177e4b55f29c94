"""`convert quantize`: what is written, that it is served joined and split with the same tokens, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import expertmesh, expertmesh_json
from safetensors.torch import load_file
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.kernels.quantised_weights import quantise_weights
from expertmesh.kernels.rows import Rows
from expertmesh.kernels.scheme import Scheme
from expertmesh.launch.held_out import held_out_tokens
from expertmesh.launch.recipe import load_recipe
from expertmesh.launch.train_job import find_start
from expertmesh.system.convert.huggingface import to_hf
from expertmesh.system.convert.quantise_checkpoint import quantise
from expertmesh.system.model.checkpoint import CheckpointError, load_weights, open_checkpoint, read_config
from expertmesh.system.model.transformer import ExpertPool, Transformer

CONFIG = tiny_model(
    moe={"expert": {"hidden_size": 144}, "shared": {"hidden_size": 24}}, dense_layers=(1,), dense={"hidden_size": 40}
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with held-out tokens, and a checkpoint in it."""
    folder = tmp_path_factory.mktemp("run")
    prepare_tiny_data(folder)
    write_random_checkpoint(folder, CONFIG)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("scheme", Scheme)
def test_every_matrix_of_the_experts_and_nothing_else(run, tmp_path, scheme):
    done = quantise(open_checkpoint(run / "random"), tmp_path / "out", scheme, shard_bytes=60_000)
    before, after = tensors(run / "random"), tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, tensor in before.items():
        if ".experts." not in name:
            assert torch.equal(after.pop(name), tensor), name
            continue
        want = quantise_weights(tensor[None], scheme)
        assert torch.equal(after.pop(name).view(torch.uint8), want.values[0].view(torch.uint8)), name
        assert torch.equal(after.pop(name + "_scale_inv").float(), want.scales[0].float()), name
        if want.factors_EP is not None:
            assert torch.equal(after.pop(name + "_factor"), want.factors_EP[0]), name
    assert not after
    config = read_config(tmp_path / "out")
    assert config.moe.quantization.scheme == scheme
    assert json.loads((tmp_path / "out" / "config.json").read_text())["moe"]["quantization"] == {"scheme": scheme}
    assert done.bytes == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert done.bytes_before == sum(t.nbytes for t in before.values())
    assert done.peak_bytes < 5 * 144 * 32 * 4 < done.bytes_before / 2, "one matrix at a time"
    assert (done.parameters, done.active_parameters) == (CONFIG.num_params(), CONFIG.num_active_params())


@pytest.mark.parametrize("scheme", Scheme)
def test_quality_is_of_the_held_out_tokens(run, tmp_path, scheme):
    found = open_checkpoint(run / "random")
    done = quantise(found, tmp_path / "out", scheme, held_out_tokens(found))
    quality = done.quality
    assert quality.held_out and quality.tokens == 32 * 64
    assert 0 < abs(quality.cross_entropy_after - quality.cross_entropy_before) < 0.1
    assert 0 < quality.max_logit_difference < quality.largest_logit
    assert f"{quality.cross_entropy_before:.4f} before, {quality.cross_entropy_after:.4f} after" in done.summary()


def test_without_a_run_a_prompt_is_read(run, tmp_path):
    done = quantise(open_checkpoint(run / "random"), tmp_path / "out", Scheme.FP8_CHANNEL)
    assert not done.quality.held_out and done.quality.cross_entropy_before is None
    assert done.quality.max_logit_difference > 0 and "over a prompt" in done.summary()


def test_fp8_loses_less_than_int4(run, tmp_path):
    lost = {s: quantise(open_checkpoint(run / "random"), tmp_path / s, s).quality.max_logit_difference for s in Scheme}
    assert max(lost[Scheme.FP8_BLOCK], lost[Scheme.FP8_CHANNEL]) < lost[Scheme.INT4_FP8]


@torch.inference_mode()
@pytest.mark.parametrize("scheme", Scheme)
def test_shards_of_the_experts_answer_as_all_of_them(run, tmp_path, scheme):
    """What an FFN worker reads of the checkpoint is its own experts, and they say the same."""
    found = open_checkpoint(quantise(open_checkpoint(run / "random"), tmp_path / "q", scheme).checkpoint)
    rows_RD, counts_E = torch.randn(9, CONFIG.hidden_size), torch.tensor([3, 0, 2, 4])
    whole = ExpertPool(found.config, 0, 1)
    found.load(whole)
    parts = [ExpertPool(found.config, rank, 2) for rank in range(2)]
    for part in parts:
        found.load(part)
    for layer in CONFIG.moe_layers:
        want = whole(layer, Rows(rows_RD, None, counts_E))
        got = [
            part(layer, Rows(rows, None, counts))
            for part, rows, counts in zip(parts, rows_RD.split([3, 6]), counts_E.split(2), strict=True)
        ]
        assert torch.equal(torch.cat(got), want)


def test_the_verb_and_the_same_tokens_joined_and_split(run, tmp_path):
    result = expertmesh_json("convert", "quantize", run / "random", "q", "--scheme", "int4-fp8", folder=tmp_path)
    assert result.keys() >= {
        *("checkpoint", "parameters", "active_parameters", "tensors", "peak_bytes", "max_logit_difference"),
        *("scheme", "bytes", "bytes_before", "cross_entropy_before", "cross_entropy_after"),
    }
    assert Path(result["checkpoint"]) == tmp_path / "q" and result["bytes"] < result["bytes_before"]
    asked = ("generate", "q", "--prompt", "import", "--max-tokens", "12", "--temperature", "0")
    joined = expertmesh_json(*asked, folder=tmp_path)
    split = expertmesh_json(*asked, "--attention", "1", "--ffn", "2", "--micro-batches", "2", folder=tmp_path)
    assert joined["token_ids"] == split["token_ids"] and len(joined["token_ids"]) == 12
    assert split["pools"] == {"attention": 1, "ffn": 2}


def test_what_is_refused(run, tmp_path):
    source = open_checkpoint(run / "random")
    out = quantise(source, tmp_path / "q", Scheme.FP8_BLOCK).checkpoint
    with pytest.raises(ValueError, match="its experts are fp8-block already$"):
        quantise(open_checkpoint(out), tmp_path / "again", Scheme.INT4_FP8)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        quantise(source, out, Scheme.INT4_FP8)
    with pytest.raises(ValueError, match="quantised experts"):
        to_hf(out, tmp_path / "hf")
    shutil.copytree(run / "data" / "tokenizer", tmp_path / "data" / "tokenizer")
    nested = write_random_checkpoint(tmp_path, tiny_model(moe={"expert": {"hidden_size": 8, "nested": (0.5, 1)}}))
    with pytest.raises(ValueError, match="supported: swiglu without nested networks$"):
        quantise(open_checkpoint(nested), tmp_path / "nested", Scheme.FP8_BLOCK)
    assert not any((tmp_path / name).exists() for name in ("again", "hf", "nested", "nested.writing"))


def test_weights_that_are_not_the_bytes_config_says_are_refused(run, tmp_path):
    """Numbers would be cast to bytes without a word."""
    shutil.copytree(run / "random", tmp_path / "wrong")
    content = json.loads((tmp_path / "wrong" / "config.json").read_text())
    content["moe"]["quantization"] = {"scheme": "fp8-block"}
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight is torch.float32, config.json asks for"):
        load_weights(Transformer(read_config(tmp_path / "wrong")), tmp_path / "wrong")


def test_wrong_words(run, tmp_path):
    done = expertmesh("convert", "quantize", run / "random", "q", "--scheme", "int3", folder=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--scheme int3: supported: fp8-block, fp8-channel, int4-fp8" in done.stderr and not (tmp_path / "q").exists()


def test_training_is_refused_with_one_line(run, tmp_path):
    with pytest.raises(ValueError, match="quantised experts are not trained"):
        load_recipe("quickstart", ["model.moe.quantization.scheme=fp8-block"])
    quantised = quantise(open_checkpoint(run / "random"), tmp_path / "q", Scheme.FP8_BLOCK).checkpoint
    recipe = load_recipe("quickstart", [f"start_from={quantised}", f"run_dir={tmp_path / 'new'}"])
    with pytest.raises(ValueError, match=r"^start_from=.*/q: quantised experts are not trained"):
        find_start(recipe, fresh=False)
    assert not (tmp_path / "new").exists()
