"""Which tokens a checkpoint is measured on: those of its own run, if it knows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.launch.held_out import SEQUENCES, held_out_tokens
from expertmesh.system.model.checkpoint import open_checkpoint
from expertmesh.system.train.dataset import TokenDataset


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's data, and a checkpoint where a run has it."""
    folder = tmp_path_factory.mktemp("run")
    prepare_tiny_data(folder)
    checkpoint = write_random_checkpoint(folder, tiny_model())
    shutil.copytree(checkpoint, folder / "checkpoints" / "step-000001")
    return folder


def test_the_first_windows_that_the_run_held_out(run):
    got = held_out_tokens(open_checkpoint(run / "checkpoints" / "step-000001"))
    (want,) = TokenDataset(run / "data").validation_batches(SEQUENCES, 64, 1)
    assert got is not None and torch.equal(got, want) and got.shape == (SEQUENCES, 65)


def test_a_link_to_it_leads_to_the_same(run, tmp_path):
    (tmp_path / "link").symlink_to(run / "checkpoints" / "step-000001")
    assert held_out_tokens(open_checkpoint(tmp_path / "link")) is not None


def test_a_checkpoint_of_no_run_has_none(run, tmp_path):
    shutil.copytree(run / "random", tmp_path / "a" / "b" / "alone")
    assert held_out_tokens(open_checkpoint(tmp_path / "a" / "b" / "alone")) is None


def test_tokens_that_the_model_does_not_know_are_not_read(run, tmp_path):
    shutil.copytree(run / "data", tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | {"vocab_size": 513}))
    shutil.copytree(run / "random", tmp_path / "random")
    assert held_out_tokens(open_checkpoint(tmp_path / "random")) is None
