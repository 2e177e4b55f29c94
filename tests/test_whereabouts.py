"""A rank's way from collective to collective has the names that a hang is told with, in the order of the pass."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_threads
from tiny import tiny_model

from expertmesh.kernels.routing import route
from expertmesh.parallel import whereabouts
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import AllGatherDispatcher, ExpertLayer
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.parallel.whereabouts import HERE, Place, inside
from expertmesh.system.plan.rehearsal import calls_of


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
    (ParallelSizes(pp=2), "a message from pipeline rank 1"),
    (ParallelSizes(tp=2, ep=2), "gather among tensor ranks"),
    (ParallelSizes(tp=2, ep=2), "reduce-scatter among tensor ranks"),
]


@pytest.mark.parametrize("sizes, name", LAYOUTS, ids=[name for _, name in LAYOUTS])
def test_other_layouts_have_names_of_their_own(way, sizes, name):
    calls_of(0, sizes, tiny_model(), 2, 8)
    assert name in way.names
    assert not dist.is_initialized()


def test_all_gather_has_the_same_names_and_one_more(way):
    def dispatch(group: dist.ProcessGroup) -> None:
        routing = route(torch.randn(3, 4), 2, "paper")
        list(AllGatherDispatcher(group, Traffic()).dispatch(torch.randn(3, 8), routing, ExpertLayer(5, 4)).arriving)

    run_threads(dispatch, 2)
    assert set(way.names) == {"layer 5 counts", "layer 5 choices", "layer 5 dispatch"}
