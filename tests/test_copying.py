"""Copies of hot experts while training: losses and weights are what they are without, and fewer bytes travel."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import new_world, run_ranks
from safetensors.torch import load_file
from tiny import losses, prepare_tiny_data, tiny_model, tiny_training

from expertmesh.kernels.device import Device
from expertmesh.parallel.dispatch_config import DispatchConfig
from expertmesh.parallel.groups import Groups, build_groups
from expertmesh.parallel.hot_experts import choose_copies
from expertmesh.parallel.placement import Placement
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.transformer import Transformer, shards
from expertmesh.system.train import copying
from expertmesh.system.train.copying import Copying
from expertmesh.system.train.snapshot import checkpoints_of, read_state
from expertmesh.system.train.trainer import Record, Trainer

# Small experts beside long batches, and a loss that lets routers be as uneven as they like: copies pay at once.
MODEL = tiny_model(layers=2, moe={"expert": {"hidden_size": 8}, "balance_loss_weight": 0.0, "ffn_experts": 8})
# Experts of layers on four ranks, two and one.
PYRAMID = tiny_model(
    layers=3, moe=MODEL.moe.model_dump() | {"ffn_experts": [8, 6, 3], "gating_residual": False, "pyramid": ()}
)
STEPS, SAVED = 10, 8
OFTEN = {"steps": STEPS, "sequence_length": 64, "learning_rate": 3e-3, "checkpoint_every": SAVED, "validate_every": 5}
SAME_LOSS = 5e-6  # float32 sums in another order, growing with the steps


class Run(NamedTuple):
    name: str
    sizes: dict[str, int]
    changes: dict[str, Any] = {}
    dispatch: dict[str, Any] = {}
    resume: str | None = None  # the run whose checkpoint of step `SAVED` it goes on from
    model: ModelConfig = MODEL
    alone: str = "alone"  # the run of the same model on one rank


COPIED = {"expert_copies": 2}
BY_NODES = {"kind": "hierarchical", "ranks_per_node": 2, "chunks": 2}
OF_PYRAMID = (PYRAMID, "a pyramid alone")
SPREAD = {"dp": 4, "ep": 2}
RUNS = [
    Run("without", SPREAD, {"zero_stage": 2}),
    Run("ZeRO 2", SPREAD, COPIED | {"zero_stage": 2}),
    Run("resumed", SPREAD, COPIED | {"zero_stage": 2}, resume="ZeRO 2"),
    Run("experts that move, ZeRO 1", SPREAD, COPIED | {"rebalance_every": 3}),
    Run(
        "four ranks, by nodes, ZeRO 0",
        {"dp": 4, "ep": 4},
        COPIED | {"zero_stage": 0},
        BY_NODES,
    ),
    Run("a pyramid by nodes", {"dp": 4, "ep": 4}, COPIED, BY_NODES, None, *OF_PYRAMID),
    # After it ranks have been in groups of other numbers, and torch would give those of nodes other names on each.
    Run(
        "a pipeline, computed twice",
        {"pp": 2, "dp": 2, "ep": 2},
        COPIED | {"micro_batch_size": 4, "recompute": "block"},
    ),
    Run("a pyramid", {"dp": 4, "ep": 4}, COPIED | {"rebalance_every": 3}, {}, None, *OF_PYRAMID),
]
ALONE = [Run("alone", {}), Run("a pyramid alone", {}, {}, {}, None, *OF_PYRAMID)]


def trained(data: Path, folder: Path, run: Run, groups: Groups) -> list[Record]:
    run_dir = folder / run.name
    if groups.rank == 0:
        shutil.copytree(data, run_dir / "data")
    if dist.get_world_size() > 1:
        dist.barrier()
    config = tiny_training(**{**OFTEN, **run.changes})
    start = None if run.resume is None else checkpoints_of(folder / run.resume)[0]
    dispatch = DispatchConfig(**run.dispatch)
    records: list[Record] = []
    Trainer(run.model, config, run_dir, groups, Device("cpu", "gloo"), {}, start, dispatch=dispatch).run(records.append)
    return records


def train_all(data: Path, folder: Path, runs: list[Run]) -> list[list[Record]]:
    """All on the same ranks: starting those takes longer than training."""
    found = []
    for run in runs:
        found.append(
            trained(data, folder, run, build_groups(ParallelSizes(**run.sizes), run.model.moe.experts_of_layers))
        )
        new_world()
    return found


class Trained(NamedTuple):
    folder: Path
    alone: dict[str, list[Record]]
    ranks: list[dict[str, list[Record]]]  # by name of the run

    @property
    def first(self) -> dict[str, list[Record]]:
        return self.ranks[0]


class Ranks:
    """Stands for a process group where nothing is sent."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize(
    "sizes, changes, dispatch, model, share, row_bytes, passes, reason",
    [
        ((2, 2, 1), {}, {}, {}, 1, 4 * 32 * 4, 1, "one group that has all tokens"),
        ((4, 2, 1), {"micro_batch_size": 4}, {}, {}, 1 / 2, 4 * 32 * 4, 2, "two groups, two micro-batches"),
        (
            (2, 2, 1),
            {},
            {"kind": "all_gather", "wire": "fp8"},
            {},
            1,
            3 * 36,
            1,
            "rows that go to all, of a byte a number",
        ),
        ((4, 2, 2), {}, {}, {}, 1 / 2, 4 * 32 * 4, 1 / 2, "experts that are cut in two"),
        (
            (2, 2, 1),
            {},
            {},
            {"share_layers": True, "moe": {"gating_residual": False}},
            1,
            512,
            2,
            "layers that are one",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_choice_is_told(monkeypatch, sizes, changes, dispatch, model, share, row_bytes, passes, reason):
    """Load of one expert-parallel group, and prices of its links: 4 experts on 2 ranks, of 3 x 32 x 32 numbers each."""
    told = []
    monkeypatch.setattr(copying, "choose_copies", lambda *given: told.append(given) or choose_copies(*given))
    config, (token, expert, cut) = tiny_model(layers=2, **model), sizes
    groups = Groups(token=Ranks(token), expert=Ranks(expert), expert_tensor=Ranks(cut) if cut > 1 else None)
    train = tiny_training(expert_copies=1, **changes)
    lanes, dispatch = {groups.expert: None}, DispatchConfig(**dispatch)
    chooser = Copying(Transformer(config, shards(config, 0, 2)), groups, train, dispatch, lanes, None)
    load_N = torch.tensor([600, 100, 100, 100, 0, 0, 50, 50][: config.moe.num_experts])
    chooser.count([load_N, load_N])
    changed = chooser.choose()
    uses = 2 if config.share_layers else 1
    assert len(told) == 2 // uses
    for layer, load_E, tokens, placement, before, most, prices in told:
        assert load_E == [uses * share * load for load in (600, 100, 100, 100)]
        assert tokens == uses * share * int(load_N.sum()) / config.moe.top_k
        assert (placement, before, most) == (Placement.contiguous(4, 2), (), 1)
        assert prices == (row_bytes, 2 * passes * 3 * 32 * 32 * 4), layer
    assert chooser.state() == {str(decision.layer): [0] for decision in changed}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("copies")
    prepare_tiny_data(folder)
    (alone,) = run_ranks(train_all, 1, folder / "data", folder, ALONE)
    ranks = run_ranks(train_all, 4, folder / "data", folder, RUNS, timeout=600)
    return Trained(
        folder,
        dict(zip((run.name for run in ALONE), alone, strict=True)),
        [dict(zip((run.name for run in RUNS), each, strict=True)) for each in ranks],
    )


def steps_of(records: list[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "step"]


def copied_events(records: list[Record]) -> list[Record]:
    return [record for record in records if record.get("what") == "copied"]


@pytest.mark.parametrize("run", [run for run in RUNS if run.resume is None], ids=lambda run: run.name)
def test_losses_and_norms_are_those_of_one_rank(runs, run):
    alone = runs.alone[run.alone]
    expected, got = steps_of(alone), steps_of(runs.first[run.name])
    if run.changes.get("micro_batch_size"):
        assert MODEL.moe.balance_loss_weight == 0, "balance losses are of a micro-batch"
    assert [step["loss"] for step in got] == pytest.approx([step["loss"] for step in expected], rel=SAME_LOSS)
    assert [step["grad_norm"] for step in got] == pytest.approx([step["grad_norm"] for step in expected], rel=1e-4)
    held_out = [[r["loss"] for r in records if r["kind"] == "validation"] for records in (alone, runs.first[run.name])]
    assert held_out[1] == pytest.approx(held_out[0], rel=SAME_LOSS)
    for records in runs.ranks[1:]:
        assert copied_events(records[run.name]) == copied_events(runs.first[run.name]), "all ranks agree"
    assert bool(copied_events(runs.first[run.name])) == bool(run.changes.get("expert_copies"))


def test_the_set_changes_between_steps_and_says_why(runs):
    events = copied_events(runs.first["ZeRO 2"])
    assert len(events) > 1 and events[0]["step"] < STEPS - 3
    for line in [line for event in events for line in event["why"]]:
        assert line.startswith("layer ") and ("; copies of expert" in line or line.endswith("; no copy pays")), line


def test_bytes_fall(runs):
    """By more than a tenth, weights and gradients counted, in each step that has copies."""
    without, copied = (steps_of(runs.first[name]) for name in ("without", "ZeRO 2"))
    first = copied_events(runs.first["ZeRO 2"])[0]["step"]
    for before, after in zip(without, copied, strict=True):
        if after["step"] <= first:
            assert after["dispatch_bytes"] == before["dispatch_bytes"], "none yet"
        else:
            assert after["dispatch_bytes"] < 0.9 * before["dispatch_bytes"], after["step"]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{path.parent.name}/{name}" if path.parent.name == "training" else name: tensor
            for path in files for name, tensor in load_file(path).items()}  # fmt: skip


def test_a_resumed_run_goes_on_bit_for_bit(runs):
    whole, resumed = runs.first["ZeRO 2"], runs.first["resumed"]
    assert losses(resumed) == losses(whole)[SAVED:]
    same = [[step["dispatch_bytes"] for step in steps_of(records)][-2:] for records in (whole, resumed)]
    assert same[0] == same[1]
    expected = tensors_of(checkpoints_of(runs.folder / "ZeRO 2")[-1])
    got = tensors_of(checkpoints_of(runs.folder / "resumed")[-1])
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


def test_layers_of_a_pyramid_have_copies_where_experts_are_spread(runs):
    """Not where each rank has all of them."""
    for name in ("a pyramid", "a pyramid by nodes"):
        why = [line for event in copied_events(runs.first[name]) for line in event["why"]]
        assert {line.split(":")[0] for line in why} == {"layer 0", "layer 1"}, name
    moved = [record for record in runs.first["a pyramid"] if record.get("what") == "rebalanced"]
    assert len(moved[0]["why"]) == 2 and moved[0]["moved"] > 0


@pytest.mark.parametrize("name", [run.name for run in RUNS[3:] if run.model is MODEL])
def test_a_checkpoint_is_that_of_a_run_without(runs, name):
    """But for the choice of copies, which is saved with it."""
    without, copied = (checkpoints_of(runs.folder / run)[0] for run in ("without", name))
    expected = tensors_of(without)
    for key, tensor in tensors_of(copied).items():
        assert_close(tensor, expected.pop(key), max_error=1e-3, rms_error=1e-4, what=key)
    assert not expected
    assert read_state(without).copied == {}
    assert set(read_state(copied).copied) <= {"0", "1"} and read_state(copied).copied
