"""What small models tell of a large one is what the large one keeps, byte for byte."""

from __future__ import annotations

import pytest
from tiny import tiny_model

from expertmesh.launch.recipe import load_recipe, shipped_recipes
from expertmesh.parallel.groups import build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.plan.activations import _even_tokens, _kept, _most_at_once, activation_bytes
from expertmesh.system.plan.rehearsal import fake_world
from expertmesh.system.plan.widths import narrowest, resized, widths_of
from expertmesh.system.train.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DENSE_AND_SHARED = {"dense_layers": (0,), "dense": {"hidden_size": 48}, "moe": {"shared": {"hidden_size": 24}}}
NOT_COUNTED = ("matformer", "mixture-of-depths")
LAYOUTS = [
    ({}, {}, "one rank"),
    ({"dp": 2, "ep": 2}, {}, "expert parallel"),
    ({"pp": 2, "dp": 2, "ep": 2}, {}, "two stages"),
    ({"tp": 2, "cp": 2, "ep": 2, "etp": 2}, DENSE_AND_SHARED, "tensors and contexts"),
]


def counted(model: ModelConfig, sizes: ParallelSizes, train: TrainConfig) -> list[int]:
    """By forwards of the model as it is: of one sequence, on each pipeline rank that has one run of layers."""
    found, unit = [], _even_tokens(model) * sizes.tp * sizes.cp
    for stage in range(sizes.pp):
        with fake_world(stage * sizes.stage_size, sizes.world_size):
            (at_lengths,) = _kept(model, widths_of(model), sizes, train, build_groups(sizes), unit)
        found.append(at_lengths[train.sequence_length // unit - 1])
    return found


def training(model: ModelConfig, sizes: ParallelSizes, **changes) -> TrainConfig:
    """One micro-batch, of one sequence on each rank."""
    length = 3 * _even_tokens(model) * sizes.tp * sizes.cp
    return TrainConfig(batch_size=sizes.dp, sequence_length=length, **changes)


@pytest.mark.parametrize("recompute", ["none", "moe", "block"])
@pytest.mark.parametrize("degrees, model, reason", LAYOUTS, ids=[reason for *_, reason in LAYOUTS])
def test_layouts(degrees, model, reason, recompute):
    sizes, config = ParallelSizes(**degrees), tiny_model(layers=4, **model)
    train = training(config, sizes, recompute=recompute)
    assert activation_bytes(config, sizes, train) == counted(config, sizes, train)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name not in NOT_COUNTED])
def test_architectures(name):
    model = load_recipe(name, []).model.model_copy(update={"vocab_size": 1024})
    train = training(model, ParallelSizes())
    assert activation_bytes(model, ParallelSizes(), train) == counted(model, ParallelSizes(), train)


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_what_is_drawn_anew_is_not_counted(name):
    model = load_recipe(name, []).model.model_copy(update={"vocab_size": 1024})
    assert activation_bytes(model, ParallelSizes(), training(model, ParallelSizes())) is None


def test_bfloat16_is_not_counted():
    train = training(tiny_model(), ParallelSizes(), dtype="bfloat16", zero_stage=3)
    assert activation_bytes(tiny_model(), ParallelSizes(), train) is None


def test_more_sequences_keep_more():
    model, sizes = tiny_model(), ParallelSizes()
    one, two, three = (
        activation_bytes(model, sizes, TrainConfig(batch_size=count, sequence_length=48))[0] for count in (1, 2, 3)
    )
    assert two - one == three - two > 0.9 * one


def test_a_stage_keeps_as_many_micro_batches_as_are_under_way():
    sizes = ParallelSizes(pp=4)
    assert [_most_at_once([10], stage, sizes, 8) for stage in range(4)] == [40, 30, 20, 10]
    assert [_most_at_once([10], stage, sizes, 2) for stage in range(4)] == [20, 20, 20, 10]
    # Forwards 0 0 1 1 (runs), 0, backward 1, forward 0: all four micro-batches in the first run, one in the second.
    assert _most_at_once([10, 1], 0, ParallelSizes(pp=2, interleave=2), 4) == 4 * 10 + 1


@pytest.mark.parametrize("name", shipped_recipes())
def test_narrow_models_are_models(name):
    model = load_recipe(name, []).model.model_copy(update={"vocab_size": 1024})
    small = narrowest(model, ParallelSizes())
    assert widths_of(resized(model, small)) == small
    assert all(less <= more for less, more in zip(small, widths_of(model), strict=True) if less is not None)
    assert resized(model, widths_of(model)) == model
