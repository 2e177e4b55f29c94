"""A rank's way from collective to collective has the names that a hang is told with, in the order of the pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_threads
from tiny import tiny_model
from torch import nn

from expertmesh.kernels.routing import route
from expertmesh.parallel import whereabouts
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import AllGatherDispatcher, ExpertLayer
from expertmesh.parallel.groups import Groups
from expertmesh.parallel.optimizer import AdamState
from expertmesh.parallel.rebalance import Decision
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.whereabouts import HERE, Place, inside
from expertmesh.system.model.tensor_parallel import parallel_transformer
from expertmesh.system.model.transformer import Transformer, shards
from expertmesh.system.plan.rehearsal import calls_of
from expertmesh.system.train import snapshot
from expertmesh.system.train.rebalancing import Rebalancing
from expertmesh.system.train.snapshot import Saver


def test_in_and_out_also_where_a_peer_is_lost(monkeypatch):
    monkeypatch.setattr(HERE, "place", Place())
    assert str(HERE.place) == "outside of any collective"
    with pytest.raises(RuntimeError), inside("layer 1 combine"):
        assert str(HERE.place) == "in layer 1 combine"
        raise RuntimeError("connection reset by peer")
    assert str(HERE.place) == "outside of any collective, after layer 1 combine"


class Way:
    """Stands in for `HERE`: the collectives that were entered, one line for the same in turn."""

    def __init__(self) -> None:
        self.names = list[str]()

    @property
    def place(self) -> Place:
        raise AssertionError("nobody reads it here")

    @place.setter
    def place(self, place: Place) -> None:
        if place.inside and self.names[-1:] != [place.collective]:
            self.names.append(place.collective)


@pytest.fixture
def way(monkeypatch) -> Way:
    way = Way()
    monkeypatch.setattr(whereabouts, "HERE", way)
    return way


LAYERS = range(3)
THERE = [f"layer {layer} {what}" for layer in LAYERS for what in ("counts", "dispatch", "combine")]
BACK = [f"layer {layer} {what} of gradients" for layer in reversed(LAYERS) for what in ("combine", "dispatch")]


def test_the_way_of_a_pass(way):
    calls_of(0, ParallelSizes(dp=2, ep=2), tiny_model(), 1, 8)
    assert way.names == [*THERE, "sums of the losses", *BACK]


LAYOUTS = [
    (ParallelSizes(pp=2), {"a message from pipeline rank 1", "messages to pipeline ranks"}),
    (
        ParallelSizes(tp=2, ep=2),
        {
            "layer 1 gather among tensor ranks",
            "layer 2 reduce-scatter among tensor ranks",
            "layer 2 gather of gradients among tensor ranks",
            "embedding reduce-scatter among tensor ranks",
            "head gather among tensor ranks",
            "cross entropy among tensor ranks",
        },
    ),
    (
        ParallelSizes(cp=2),
        {"layer 1 gather among context ranks", "layer 2 reduce-scatter of gradients among context ranks"},
    ),
    (
        ParallelSizes(dp=2, etp=2),
        {
            "layer 1 counts among expert tensor ranks",
            "layer 2 rows among expert tensor ranks",
            "layer 0 answers among expert tensor ranks of gradients",
        },
    ),
]


@pytest.mark.parametrize("sizes, names", LAYOUTS, ids=["pipeline", "tensor", "context", "expert tensor"])
def test_other_layouts_have_names_of_their_own(way, sizes, names):
    calls_of(0, sizes, tiny_model(), 2, 8)
    assert names <= set(way.names)
    assert not dist.is_initialized()


def test_a_capacity_of_split_sequences_has_a_name_for_each_kind_of_ranks(way):
    calls_of(0, ParallelSizes(tp=2, cp=2), tiny_model(moe={"capacity": {"factor": 1.0}}), 1, 8)
    assert {f"layer 1 capacity gather among {kind} ranks" for kind in ("tensor", "context")} <= set(way.names)


class Optimizer:
    """Stands in for a `TrainingOptimizer`; notes where it is asked for what other ranks have, too."""

    def __init__(self, asked: list[Place]) -> None:
        self.asked = asked

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        self.asked.append(HERE.place)
        return parameter.detach()

    master = weight

    def state(self, parameter: nn.Parameter) -> AdamState:
        return AdamState(self.weight(parameter), self.weight(parameter))

    def replace(self, *_: object) -> None:
        pass


def test_gathers_of_a_checkpoint(monkeypatch, tmp_path):
    asked, gathered = list[Place](), list[Place]()

    def gather_parts(part: torch.Tensor, group: dist.ProcessGroup, to: int) -> list[torch.Tensor]:
        gathered.append(HERE.place)
        return [part]

    monkeypatch.setattr(snapshot, "gather_parts", gather_parts)
    groups = Groups(tensor=SimpleNamespace(size=lambda: 2, rank=lambda: 0))  # type: ignore[arg-type]
    model = parallel_transformer(tiny_model(), groups)
    with Saver(tmp_path, groups, tmp_path, 1, lambda step, folder: None) as saver:
        saver._copy(model, Optimizer(asked))  # type: ignore[arg-type]
    assert Place("a checkpoint's gather of layers.1.mlp.experts.down", True) in asked
    assert Place("a checkpoint's gather of layers.2.self_attn.q_proj.weight", True) in gathered
    assert all(place.inside and "gather of" in place.collective for place in asked + gathered)


def test_moves_of_experts(way):
    config, asked = tiny_model(layers=2), list[Place]()

    def move(group: dist.ProcessGroup) -> list[Decision]:
        rebalancing = Rebalancing(Transformer(config, shards(config, group.rank(), 2)), Groups(expert=group))
        rebalancing.count([torch.tensor([9, 9, 0, 0] + [0] * config.moe.zero_computation_experts)] * 2)
        return rebalancing.rebalance(Optimizer(asked), 10**6)  # type: ignore[arg-type]

    assert all(decision.moves for decisions in run_threads(move, 2) for decision in decisions)
    assert set(way.names) == {"layer 0 moves of experts", "layer 1 moves of experts"}


def test_all_gather_has_the_same_names_and_one_more(way):
    def dispatch(group: dist.ProcessGroup) -> None:
        routing = route(torch.randn(3, 4), 2, "paper")
        list(AllGatherDispatcher(group, Traffic()).dispatch(torch.randn(3, 8), routing, ExpertLayer(5, 4)).arriving)

    run_threads(dispatch, 2)
    assert set(way.names) == {"layer 5 counts", "layer 5 choices", "layer 5 dispatch"}
