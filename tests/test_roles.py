"""A worker process that is kept from epoch to epoch keeps nothing of the models before."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks
from tiny import prepare_tiny_data, tiny_model, tiny_training
from torch import nn

from expertmesh.launch import roles
from expertmesh.launch.recipe import load_recipe
from expertmesh.launch.rendezvous import Rendezvous
from expertmesh.launch.roles import Epoch, TrainerRole


class PeerIsGoneError(Exception):
    pass


def check_what_is_kept(run_dir: Path, zero_stage: int) -> None:
    """Two epochs in one process; the first ends by an error, which is looked at while it is still there."""
    dist.destroy_process_group()  # a role makes its own
    models: list[weakref.ref[nn.Module]] = []

    def strike(chaos: object, rank: int, step: int, skip: object, model: nn.Module) -> None:
        models.append(weakref.ref(model))
        if len(models) == 2:
            raise PeerIsGoneError("told by a collective")

    roles.strike = strike  # type: ignore[assignment]
    train = tiny_training(zero_stage=zero_stage, steps=3)
    recipe = load_recipe("quickstart", [f"run_dir={run_dir}"]).model_copy(update={"train": train})
    recipe = recipe.model_copy(update={"parallel": type(recipe.parallel)()})
    meeting = Rendezvous("127.0.0.1")
    role = TrainerRole(0, "127.0.0.1", meeting.port)

    def epoch(number: int) -> Epoch:
        return Epoch(number, recipe, tiny_model(), {}, None, None, [], frozenset())

    with pytest.raises(PeerIsGoneError, match="told by a collective") as lost:
        role.run(epoch(0), 0)
    assert [entry.name for entry in lost.traceback if "trainer" in str(entry.path)], "where it happened is still told"
    assert [model() for model in models] == [None, None]
    assert role.run(epoch(1), 0) == 3
    assert len(models) == 5 and not any(model() for model in models)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_kept_worker_lets_go_of_its_model(tmp_path, zero_stage):
    prepare_tiny_data(tmp_path)
    run_ranks(check_what_is_kept, 1, tmp_path, zero_stage)
