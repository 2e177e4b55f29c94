"""What is planned is what real ranks have and send."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from ranks import new_world, run_ranks
from tiny import prepare_tiny_data, tiny_model, tiny_training
from torch import nn
from torch.distributed.tensor import DTensor

from expertmesh.kernels.device import Device
from expertmesh.parallel.groups import build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.experts import RoutedExperts
from expertmesh.system.model.tensor_parallel import SplitEmbedding
from expertmesh.system.plan.rehearsal import calls_of
from expertmesh.system.plan.training_plan import RankPlan, plan_training
from expertmesh.system.plan.widths import narrowest, resized
from expertmesh.system.train.config import TrainConfig
from expertmesh.system.train.trainer import Record, Trainer

MODEL = tiny_model(layers=4, tie_embeddings=True)
LENGTH = 16
LAYOUTS = [
    ({"tp": 2}, "one stage: embedding and head"),
    ({"tp": 4, "dp": 2, "ep": 2}, "four"),
    ({"tp": 2, "pp": 2, "cp": 2}, "two stages: one embeds, the other has the head"),
    ({"tp": 2, "pp": 2, "interleave": 2}, "two runs of layers on each"),
    ({"pp": 4}, "those in the middle send both ways"),
]
DENSE = {"layers": 4, "dense_layers": (0,), "dense": {"hidden_size": 32}}
MODELS = [MODEL, tiny_model(**DENSE, moe={"shared": {"hidden_size": 16}})]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", MODELS, ids=["tied", "dense and shared"])
@pytest.mark.parametrize("sizes, reason", LAYOUTS, ids=[reason for _, reason in LAYOUTS])
def test_bytes_are_those_that_a_rank_asks_to_send(sizes, reason, model):
    """Of a narrow model, whose calls are noted one by one."""
    if sizes.get("tp") == 4:
        model = model.model_copy(update={"attention": model.attention.model_copy(update={"kv_heads": 4})})
    layout, micro_batches = ParallelSizes(**sizes), 4
    train = TrainConfig(batch_size=micro_batches * layout.dp, micro_batch_size=layout.dp, sequence_length=LENGTH)
    for stage, plan in enumerate(plan_training(resized(model, narrowest(model, layout)), layout, train)):
        rank = stage * layout.stage_size
        calls = calls_of(rank, layout, model, micro_batches, LENGTH)
        down_and_up = sum(call.numbers or 0 for call in calls if call.what == "send")
        assert plan.sent_bytes["pipeline"] == 4 * down_and_up
        tensor_group = tuple(range(rank, rank + layout.tp))
        of_tensor = [call for call in calls if call.ranks == tensor_group and layout.tp > 1]
        gathered = sum(call.numbers or 0 for call in of_tensor if call.what == "_allgather_base_")
        scattered = sum(call.numbers or 0 for call in of_tensor if call.what == "_reduce_scatter_base_")
        # A rank's part goes to each other; of a sum each other's part does.
        assert plan.sent_bytes["tensor"] == 4 * (layout.tp - 1) * (gathered + scattered // layout.tp)
        context_group = tuple(range(rank, rank + layout.tp * layout.cp, layout.tp))
        of_context = [call for call in calls if call.ranks == context_group and layout.cp > 1]
        gathered = sum(call.numbers or 0 for call in of_context if call.what == "_allgather_base_")
        scattered = sum(call.numbers or 0 for call in of_context if call.what == "_reduce_scatter_base_")
        assert plan.sent_bytes["context"] == 4 * (layout.cp - 1) * (gathered + scattered // layout.cp)


def trained(run_dir, sizes: ParallelSizes, train: TrainConfig, model: ModelConfig = MODEL) -> dict[str, int]:
    groups = build_groups(sizes, model.moe.experts_of_layers)
    trainer = Trainer(model, train, run_dir, groups, Device("cpu", "gloo"), {}, None, dispatch=sizes.dispatch)
    records: list[Record] = []
    trainer.run(records.append)
    (step,) = [record for record in records if record["kind"] == "step"]
    parts = trainer.zero._optimizer.single_partition_of_fp32_groups
    state = trainer.zero._optimizer.optimizer.state
    moments = sum(state[part][key].nbytes for part in parts for key in ("exp_avg", "exp_avg_sq"))
    return {
        "weights": sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad),
        "masters": sum(part.nbytes for part in parts),
        "moments": moments,
        "dispatch": step["dispatch_bytes"],
        "pipeline": step["pipeline_bytes"],
    }


# Experts of one layer on both ranks of a stage, of the other on each; and on four, two and one.
STEEP = tiny_model(layers=4, moe={"ffn_experts": [3, 4, 2, 5], "gating_residual": False})
REAL = [
    (MODEL, {"pp": 2, "dp": 2, "ep": 2}, "two stages"),
    (STEEP, {"pp": 2, "dp": 2, "ep": 2}, "two stages of a pyramid"),
    (STEEP, {"dp": 4, "ep": 4}, "a pyramid's layers"),
]


@pytest.mark.parametrize("model, sizes, reason", REAL, ids=[reason for *_, reason in REAL])
def test_four_real_ranks(tmp_path, model, sizes, reason):
    prepare_tiny_data(tmp_path)
    sizes, train = ParallelSizes(**sizes), tiny_training(steps=1, micro_batch_size=4, warmup_steps=0)
    plans = plan_training(model, sizes, train)
    (tmp_path / "run").mkdir()
    shutil.move(tmp_path / "data", tmp_path / "run" / "data")
    ranks = run_ranks(trained, 4, tmp_path / "run", sizes, train, model)
    for rank, real in enumerate(ranks):
        plan = plans[rank // sizes.stage_size]
        assert real["weights"] == plan.weight_bytes
        # DeepSpeed rounds a partition up to a few numbers.
        assert real["masters"] + real["moments"] == pytest.approx(plan.optimizer_bytes * 3 / 4, abs=10 * 3 * 4 * 8)
        # Experts are not chosen quite evenly yet.
        dispatch = sum(p.sent_bytes["dispatch"] for p in plans) * sizes.stage_size
        assert real["dispatch"] == pytest.approx(dispatch, rel=0.1)
        assert real["pipeline"] == sizes.stage_size * sum(p.sent_bytes["pipeline"] for p in plans)
    assert {plan.sent_bytes["tensor"] for plan in plans} == {0}


ROADS = [
    ({"dp": 2, "ep": 2, "dispatch": {"kind": "all_gather", "wire": "fp8"}}, "to all ranks, on a narrow wire"),
    ({"dp": 2, "etp": 2}, "experts in slices"),
]


@pytest.mark.parametrize("sizes, reason", ROADS, ids=[reason for _, reason in ROADS])
def test_bytes_of_other_roads_to_the_experts(sizes, reason, tmp_path):
    prepare_tiny_data(tmp_path)
    layout, train = ParallelSizes(**sizes), tiny_training(steps=1, micro_batch_size=4, warmup_steps=0)
    (plan,) = plan_training(MODEL, layout, train)
    (tmp_path / "run").mkdir()
    shutil.move(tmp_path / "data", tmp_path / "run" / "data")
    for real in run_ranks(trained, 2, tmp_path / "run", layout, train):
        assert real["dispatch"] == pytest.approx(2 * plan.sent_bytes["dispatch"], rel=0.1)


def most_weights(layouts: list[ParallelSizes], train: TrainConfig, run_dir: Path) -> list[dict[str, int]]:
    """Of a fully sharded rank, in each: bytes of weights, shards and whole ones, when there are most; what is sent."""
    found = []
    for sizes in layouts:
        found.append(most_weights_in(sizes, train, run_dir))
        new_world()
    return found


def most_weights_in(sizes: ParallelSizes, train: TrainConfig, run_dir: Path) -> dict[str, int]:
    trainer = Trainer(MODEL, train, run_dir, build_groups(sizes), Device("cpu", "gloo"), {}, None)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    shards, seen = sum(p.to_local().nbytes for p in trained.values()), []

    def look(*_: object) -> None:
        now = dict(trainer.model.named_parameters())
        seen.append(shards + sum(now[name].nbytes for name in trained if not isinstance(now[name], DTensor)))

    for module in trainer.model.modules():
        if isinstance(module, RoutedExperts | nn.Embedding | SplitEmbedding):
            module.register_forward_hook(look, prepend=True)
    records: list[Record] = []
    trainer.run(records.append)
    (step,) = [record for record in records if record["kind"] == "step"]
    states = trainer.zero._adam.state.values()
    moments = sum(state[key].to_local().nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
    sent = {"dispatch": step["dispatch_bytes"], "pipeline": step["pipeline_bytes"]}
    return {"weights": max(seen), "moments": moments} | sent


SHARDED = [
    ParallelSizes(dp=2, ep=2),
    ParallelSizes(tp=2, ep=2),
    ParallelSizes(dp=2, etp=2),
    ParallelSizes(pp=2),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_real_ranks_fully_sharded(tmp_path, dtype):
    prepare_tiny_data(tmp_path)
    train = tiny_training(steps=1, zero_stage=3, dtype=dtype, warmup_steps=0, micro_batch_size=4)
    ranks = run_ranks(most_weights, 2, SHARDED, train, tmp_path)
    for sizes, *reals in zip(SHARDED, *ranks, strict=True):
        plans = plan_training(MODEL, sizes, train)
        for rank, real in enumerate(reals):
            plan = plans[rank // sizes.stage_size]
            assert real["weights"] == plan.weight_bytes == plan.gradient_bytes, sizes
            assert real["moments"] == plan.optimizer_bytes, sizes
            dispatch = sum(plan.sent_bytes["dispatch"] for plan in plans) * sizes.stage_size
            assert real["dispatch"] == pytest.approx(dispatch, rel=0.1), sizes
            assert real["pipeline"] == sum(plan.sent_bytes["pipeline"] for plan in plans) * sizes.stage_size, sizes


REDUCED = [
    ({"dp": 2, "ep": 2}, "gathered and reduced"),
    ({"tp": 2, "cp": 2, "dp": 2, "ep": 2, "etp": 2}, "norms and routers are summed over tensor ranks"),
    ({"pp": 2, "dp": 2}, "the embedding is summed over both ends"),
    ({"pp": 2, "interleave": 2, "dp": 4}, "a backward reduces the layers of one run"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("sizes, reason", REDUCED, ids=[reason for _, reason in REDUCED])
def test_bytes_of_full_sharding_are_those_that_a_rank_asks_to_send(sizes, reason):
    """Of a narrow model: what is asked for at ZeRO 3 and not at 1."""
    model = tiny_model(layers=4, tie_embeddings=True, moe={"gating_residual": False})
    layout, micro_batches = ParallelSizes(**sizes), 4
    train = tiny_training(batch_size=micro_batches * layout.dp, micro_batch_size=layout.dp, zero_stage=3)
    for stage, plan in enumerate(plan_training(resized(model, narrowest(model, layout)), layout, train)):
        some, all_ = (
            Counter(calls_of(stage * layout.stage_size, layout, model, micro_batches, LENGTH, zero_stage))
            for zero_stage in (1, 3)
        )
        sent = 0.0
        for call, times in (all_ - some).items():
            ranks = len(call.ranks)
            ways = {"_allgather_base_": ranks, "_reduce_scatter_base_": 1, "allreduce_": 2}[call.what]
            sent += times * ways * call.numbers * (ranks - 1) / ranks
        norm = 2 * (layout.world_size - 1) / layout.world_size
        # A number of rows that ranks do not divide is filled up.
        assert plan.sent_bytes["reduction"] == pytest.approx(4 * (sent - norm), rel=0.01)


def test_stages_of_zero_split_more_and_more():
    def plan(stage: int, **changes) -> RankPlan:
        (only,) = plan_training(MODEL, ParallelSizes(dp=4), tiny_training(zero_stage=stage, batch_size=8, **changes))
        return only

    none, some, all_ = plan(0), plan(1), plan(3)
    assert some == plan(2)
    assert none.optimizer_bytes == 8 * none.parameters and none.weight_bytes == some.weight_bytes
    assert all_.optimizer_bytes == pytest.approx(none.optimizer_bytes / 4, rel=1e-3)
    assert all_.memory_bytes < some.memory_bytes < none.memory_bytes
    assert none.sent_bytes == some.sent_bytes
    assert all_.sent_bytes["reduction"] == some.sent_bytes["reduction"] * 3 // 2
    assert plan(3, micro_batch_size=4).sent_bytes["reduction"] == 2 * all_.sent_bytes["reduction"]


def test_experts_and_optimizer_shrink_with_ranks():
    train = tiny_training(batch_size=8)
    (one,) = plan_training(MODEL, ParallelSizes(), train)
    (spread,) = plan_training(MODEL, ParallelSizes(dp=4, ep=4), train)
    assert one.parameters == MODEL.num_params()
    assert spread.parameters < one.parameters
    assert one.optimizer_bytes == 16 * one.parameters and one.sent_bytes == dict.fromkeys(one.sent_bytes, 0)
    (twice,) = plan_training(MODEL, ParallelSizes(dp=4), train)
    assert twice.optimizer_bytes == pytest.approx(one.optimizer_bytes / 4, abs=16)
    assert twice.sent_bytes["reduction"] == 8 * one.parameters * 3 // 4
    (by_nodes,) = plan_training(MODEL, ParallelSizes(dp=4, ep=4, dispatch={"kind": "hierarchical"}), train)
    assert by_nodes.sent_bytes["dispatch"] is None
