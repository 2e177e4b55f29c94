"""A rank of fully sharded training begins, and goes on, with room for its shards and for one part that is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import prepare_tiny_data, tiny_model, tiny_training
from torch import nn
from torch.profiler import ProfilerActivity, profile

from expertmesh.kernels.device import Device
from expertmesh.parallel.groups import build_groups
from expertmesh.parallel.optimizer import local
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.transformer import Transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.plan.rehearsal import fake_world
from expertmesh.system.train.build_optimizer import units_of
from expertmesh.system.train.snapshot import checkpoints_of
from expertmesh.system.train.trainer import Trainer

MODEL = tiny_model(layers=12, hidden_size=64)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of one rank, with a checkpoint."""
    run_dir = tmp_path_factory.mktemp("sharded")
    prepare_tiny_data(run_dir)
    with fake_world(0, 1):
        trainer_of(run_dir, ParallelSizes(), None).run(lambda record: None)
    return run_dir


def trainer_of(run_dir: Path, sizes: ParallelSizes, resume_from: Path | None) -> Trainer:
    config = tiny_training(steps=1, zero_stage=3, warmup_steps=0)
    return Trainer(MODEL, config, run_dir, build_groups(sizes), Device("cpu", "gloo"), {}, resume_from)


def nbytes(module: nn.Module) -> int:
    """Of its weights whole."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def most_bytes(profiled: profile, files: set[int]) -> int:
    """What was allocated at once. A file that is mapped, of one of these sizes, takes no memory of its own."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes() if abs(event.nbytes()) not in files else 0
        most = max(most, now)
    return most


@pytest.mark.parametrize("sizes", [{"dp": 8}, {"tp": 2, "dp": 4, "ep": 2}], ids=str)
@pytest.mark.parametrize("resumed", [False, True], ids=["drawn", "resumed"])
def test_no_rank_holds_whole_weights_at_once(run_dir, resumed, sizes):
    (checkpoint,) = checkpoints_of(run_dir)
    with fake_world(3, 8):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model = trainer_of(run_dir, ParallelSizes(**sizes), checkpoint if resumed else None).model
        units = units_of(model)
        shards = sum(local(parameter).nbytes for parameter in model.parameters())
        part = max(nbytes(part) for part in (*units.experts, *units.parts))
        full = 4 * MODEL.vocab_size * MODEL.hidden_size  # the largest tensor, of which a tensor rank has a part
        # With a checkpoint there are two moments of each weight, too.
        expected = (3 if resumed else 1) * shards + part + full
        most = most_bytes(profiled, {path.stat().st_size for path in checkpoint.rglob("*.safetensors")})
        assert shards < most < expected * 1.02 < nbytes(model)


def test_parts_begin_with_the_values_of_their_names(run_dir):
    """Every shard is that of the model that is drawn at once."""
    whole = Transformer(MODEL)
    config = tiny_training()
    initialise(whole, config.seed, MODEL.initializer_range)
    wanted = dict(whole.named_parameters())
    with fake_world(0, 8):
        model = trainer_of(run_dir, ParallelSizes(dp=8), None).model
        for name, parameter in model.named_parameters():
            first = [slice(0, size) for size in local(parameter).shape]
            assert torch.equal(local(parameter), wanted[name][tuple(first)]), name
