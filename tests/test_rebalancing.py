"""Experts that change ranks in the middle of a run change nothing else: losses, checkpoints, what follows from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import losses, prepare_tiny_data, tiny_model, tiny_training

from expertmesh.kernels.device import Device
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.train.snapshot import checkpoints_of
from expertmesh.system.train.trainer import Record, Trainer

# Small experts beside long batches, and a loss that lets routers be as uneven as they like: moving pays at once.
MODEL = tiny_model(layers=2, moe={"expert": {"hidden_size": 8}, "balance_loss_weight": 0.0, "ffn_experts": 8})
STAYING = {"steps": 10, "sequence_length": 64, "learning_rate": 3e-3, "checkpoint_every": 8, "validate_every": 10}
# Float32 sums in another order, growing with the steps.
SAME_LOSS = 5e-6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("tiny")
    prepare_tiny_data(run_dir)
    return run_dir / "data"


def trained(data: Path, run_dir: Path, groups: Groups, **changes: Any) -> list[Record]:
    if groups.rank == 0:
        shutil.copytree(data, run_dir / "data")
    dist.barrier()
    records: list[Record] = []
    config = tiny_training(**{**STAYING, **changes})
    trainer = Trainer(MODEL, config, run_dir, groups, Device("cpu", "gloo"), {}, None)
    trainer.run(records.append)
    return records


def stay_and_move(data: Path, folder: Path) -> list[list[Record]]:
    """All runs on the same ranks: starting those takes longer than training."""
    groups = build_groups(ParallelSizes(dp=4, ep=2))
    return [
        trained(data, folder / "stayed", groups, zero_stage=2),
        trained(data, folder / "moved", groups, zero_stage=2, rebalance_every=3),
        trained(data, folder / "sharded", groups, zero_stage=3, rebalance_every=3),
    ]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{path.parent.name}/{name}" if path.parent.name == "training" else name: tensor
            for path in files for name, tensor in load_file(path).items()}  # fmt: skip


def test_moving_experts_changes_nothing_else(data, tmp_path):
    ranks = run_ranks(stay_and_move, 4, data, tmp_path, timeout=600)
    stayed, moved, sharded = ranks[0]
    assert losses(moved) == pytest.approx(losses(stayed), rel=SAME_LOSS)
    assert losses(sharded) == pytest.approx(losses(stayed), rel=SAME_LOSS)

    events = [record for record in moved if record.get("what") == "rebalanced"]
    assert [event["step"] for event in events] == [3, 6, 9], "not after the last step"
    assert events[0]["moved"] >= 2 and len(events[0]["why"]) == 2
    assert all(line.startswith(f"layer {layer}: the busiest rank") for layer, line in enumerate(events[0]["why"]))
    for records in (sharded, *(moved for _, moved, _ in ranks[1:])):
        assert [record for record in records if record.get("what") == "rebalanced"] == events, "all ranks agree"

    # By name, weights and moments are what they would have been: the checkpoint is any other's (test_trainer.py).
    for run in ("moved", "sharded"):
        expected = tensors_of(checkpoints_of(tmp_path / "stayed")[0])
        for name, tensor in tensors_of(checkpoints_of(tmp_path / run)[0]).items():
            assert_close(tensor, expected.pop(name), max_error=1e-3, rms_error=1e-4, what=f"{run}: {name}")
        assert not expected
