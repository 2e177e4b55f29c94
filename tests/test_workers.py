"""Which dtype a worker holds its model in; in bfloat16, as on a GPU, the split model says what the joined one says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving import answers, requests, split_in_threads
from tiny import prepare_tiny_data, tiny_model, write_random_checkpoint

from expertmesh.system.model.checkpoint import OwnCheckpoint, open_checkpoint
from expertmesh.system.model.transformer import ExpertPool, Transformer
from expertmesh.system.serve import workers
from expertmesh.system.serve.config import ServeConfig
from expertmesh.system.serve.workers import held, joined_engine, serving_dtype


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> OwnCheckpoint:
    run_dir: Path = tmp_path_factory.mktemp("served")
    prepare_tiny_data(run_dir)
    gate = {"gate": {"hidden_size": 16}}
    return open_checkpoint(write_random_checkpoint(run_dir, tiny_model(moe=gate)))


@pytest.fixture
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "serving_dtype", lambda checkpoint, device: torch.bfloat16)


def test_a_gpu_takes_the_dtype_of_the_checkpoint_and_a_cpu_float32(checkpoint):
    found = {}
    for stored in ("float32", "bfloat16", "float16"):
        of_dtype = OwnCheckpoint(checkpoint.folder, checkpoint.config, stored, checkpoint.weight_map)
        found[stored] = [serving_dtype(of_dtype, device) for device in ("cpu", "cuda:1")]
    assert found == {
        "float32": [torch.float32, torch.float32],
        "bfloat16": [torch.float32, torch.bfloat16],
        "float16": [torch.float32, torch.float16],
    }


def test_routers_are_float32_whatever_the_model_is(checkpoint, in_bfloat16):
    model = held(Transformer(checkpoint.config), checkpoint, "cpu")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    routers = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert routers == {name for name in dtypes if ".mlp.gate." in name} and len(routers) == 3 * 2 + 2
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    exact = Transformer(checkpoint.config)
    checkpoint.load(exact)
    for name, parameter in exact.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.to(dtypes[name])), name
    pool = held(ExpertPool(checkpoint.config, 0, 2), checkpoint, "cpu")
    assert {parameter.dtype for parameter in pool.parameters()} == {torch.bfloat16}


def test_split_equals_joined_in_bfloat16(checkpoint, in_bfloat16):
    joined = answers(joined_engine(checkpoint, ServeConfig()), requests())
    assert split_in_threads(checkpoint, ServeConfig(), 1, 2, requests()) == [joined]
    assert any(len(set(answer)) > 4 for answer in joined.values())
