"""What a change of the weights does: cross entropy as training validates it, logits, and the prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import context_of, prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.parallel.groups import Groups
from expertmesh.system.convert.quality import compare
from expertmesh.system.model.checkpoint import load_weights, open_checkpoint
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.train.dataset import TokenDataset
from expertmesh.system.train.loss import LanguageModelLoss

CONFIG = tiny_model()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's data, and a checkpoint beside it."""
    folder = tmp_path_factory.mktemp("run")
    prepare_tiny_data(folder)
    write_random_checkpoint(folder, CONFIG)
    return folder


def changed(folder: Path, out: Path) -> Path:
    """A copy whose weights are all a little smaller."""
    shutil.copytree(folder, out)
    for file in out.glob("*.safetensors"):
        save_file({name: tensor * 0.97 for name, tensor in load_file(file).items()}, file)
    return out


def model_of(folder: Path) -> Transformer:
    model = Transformer(CONFIG)
    load_weights(model, folder)
    return model


@torch.inference_mode()
def test_cross_entropy_is_what_training_validates(run, tmp_path):
    other = changed(run / "random", tmp_path / "other")
    (tokens_BS1,) = TokenDataset(run / "data").validation_batches(7, CONFIG.context_length, 1)
    quality = compare(open_checkpoint(run / "random"), open_checkpoint(other), tokens_BS1)
    for folder, got in ((run / "random", quality.cross_entropy_before), (other, quality.cross_entropy_after)):
        loss = LanguageModelLoss(model_of(folder), LocalDispatcher(), Groups())
        assert got == pytest.approx(loss(tokens_BS1).cross_entropy.item(), rel=1e-5)
    assert quality.held_out and quality.tokens == 7 * CONFIG.context_length
    first_S = tokens_BS1[0, :-1]
    models = (model_of(folder) for folder in (run / "random", other))
    before, after = (model.lm_head(model(first_S, context_of(len(first_S))).hidden_TD) for model in models)
    assert quality.max_logit_difference == pytest.approx((before - after).abs().max().item(), rel=1e-4)
    assert quality.largest_logit == pytest.approx(before.abs().max().item(), rel=1e-4)


def test_nothing_changed_nothing_lost(run):
    found = open_checkpoint(run / "random")
    quality = compare(found, found, torch.arange(40).view(2, 20))
    assert quality.cross_entropy_before == quality.cross_entropy_after and quality.max_logit_difference == 0


def test_a_prompt_is_read_within_the_context(run, tmp_path):
    shutil.copytree(run / "random", tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"context_length": 5}))
    found = open_checkpoint(config.parent)
    quality = compare(found, found, None)
    assert (quality.held_out, quality.tokens, quality.cross_entropy_before) == (False, 5, None)
