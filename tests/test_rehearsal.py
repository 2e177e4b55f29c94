"""The order of collectives of ranks that are not there: it is what real ranks do, and a disagreement is found."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from ranks import new_world, run_ranks
from tiny import tiny_model

from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.build_dispatcher import build_dispatcher
from expertmesh.parallel.groups import build_groups
from expertmesh.parallel.sizes import ParallelSizes
from expertmesh.system.model.tensor_parallel import parallel_transformer
from expertmesh.system.model.weights import initialise
from expertmesh.system.plan.rehearsal import Call, Recorder, _batches, calls_of, play, to_rehearse
from expertmesh.system.plan.widths import narrowest, resized
from expertmesh.system.train.loss import LanguageModelLoss
from expertmesh.system.train.passes import Passes
from expertmesh.system.train.tally import tally

MODEL = tiny_model(layers=4, tie_embeddings=True)
PYRAMID = tiny_model(layers=4, moe={"ffn_experts": [4, 6, 3, 1], "gating_residual": False})
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LAYOUTS = [
    ({}, "one rank asks for nothing"),
    ({"dp": 2, "ep": 2}, "expert parallel"),
    ({"tp": 2, "etp": 2}, "tensors of both kinds"),
    ({"pp": 2, "interleave": 2}, "the next stage is the one before"),
    ({"pp": 2, "tp": 2, "dp": 2, "ep": 2}, "eight ranks"),
    ({"tp": 2, "dp": 2, "ep": 4}, "experts once on a stage"),
]


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("model", [MODEL, PYRAMID], ids=["one degree", "a pyramid"])
@pytest.mark.parametrize("sizes, reason", LAYOUTS, ids=[reason for _, reason in LAYOUTS])
def test_ranks_agree(sizes, reason, model, zero_stage):
    layout = ParallelSizes(**sizes)
    orders = {rank: calls_of(rank, layout, model, 4, 8, zero_stage) for rank in to_rehearse(layout)}
    assert play(orders) is None
    # Fully sharded, a rank alone takes its norm's sum over itself.
    assert all(orders.values()) == (layout.world_size > 1 or zero_stage == 3)
    # And one that leaves out a call, or makes two in another order, does not go unseen.
    for rank in list(orders)[:2] if layout.world_size > 1 else []:
        for place in (0, len(orders[rank]) // 2, len(orders[rank]) - 1):
            calls = orders[rank]
            assert play(orders | {rank: calls[:place] + calls[place + 1 :]}) is not None, calls[place]


def real_calls(layouts: list[ParallelSizes]) -> list[list[Call]]:
    """What this rank asks for in each, of ranks that are there."""
    found = []
    for sizes in layouts:
        found.append(calls_in(sizes))
        new_world()
    return found


def calls_in(sizes: ParallelSizes) -> list[Call]:
    groups = build_groups(sizes)
    part = parallel_transformer(resized(MODEL, narrowest(MODEL, sizes)), groups)
    initialise(part, 0, 0.02)
    loss = LanguageModelLoss(part, build_dispatcher(groups, sizes.dispatch, Traffic(), "cpu"), groups)
    passes = Passes(loss, _batches(groups, 2, 8))
    with Recorder() as recorder:
        for total in passes.totals():
            total.backward()
        tally(passes.answers, 2, part.config, groups)
    return recorder.calls


def test_what_is_rehearsed_is_what_real_ranks_do():
    layouts = [ParallelSizes(dp=2, ep=2), ParallelSizes(tp=2, etp=2), ParallelSizes(pp=2)]
    for rank, orders in enumerate(run_ranks(real_calls, 2, layouts)):
        for sizes, calls in zip(layouts, orders, strict=True):
            assert calls == calls_of(rank, sizes, MODEL, 2, 8) and len(calls) > 8
        kinds = {call.what for calls in orders for call in calls}
        assert kinds == {"alltoall_base_", "allreduce_", "_allgather_base_", "_reduce_scatter_base_", "send", "recv_"}
    assert not dist.is_initialized()


AB, BC, CA = (0, 1), (1, 2), (0, 2)


def in_order(*groups: tuple[int, ...]) -> list[Call]:
    return [Call("a", group, 1) for group in groups]


PLAYS = [
    ({0: [Call("a", AB, 1)], 1: [Call("a", AB, 1)]}, None, "one collective"),
    ({0: [Call("a", AB, 1)], 1: [Call("a", AB, 2)]}, "rank 0 is at a of 1 numbers among ranks", "other sizes"),
    ({0: [Call("a", AB, 1)], 1: [Call("b", AB, 1)]}, "rank 0 is at a of 1 numbers", "other kinds"),
    ({0: [Call("a", AB, 1)], 1: []}, "rank 0 waits at a of 1 numbers among ranks [0, 1], but rank 1", "one more"),
    (
        {
            0: [Call("a", AB, 1), Call("a", CA, 1)],
            1: [Call("a", BC, 1), Call("a", AB, 1)],
            2: [Call("a", CA, 1), Call("a", BC, 1)],
        },
        "all wait: rank 0 at a",
        "each waits for the next, though any two agree on their order",
    ),
    ({0: [Call("send", AB, 3)], 1: [Call("recv_", AB, 3)]}, None, "a message"),
    (
        {0: [Call("send", AB, 3)], 1: [Call("recv_", AB, 4)]},
        "rank 1 waits for 4 numbers of rank 0, which sent 3",
        "size",
    ),
    ({0: [Call("send", AB, 3)], 1: []}, "rank 1 never reads what rank 0 sent", "a message that is not read"),
    ({0: [], 1: [Call("recv_", AB, 3)]}, "all wait: rank 1 at recv of 3 numbers", "a message that is not sent"),
    (
        {0: [Call("recv_", (1, 0), 1), Call("send", AB, 1)], 1: [Call("recv_", AB, 1), Call("send", (1, 0), 1)]},
        "all wait: rank 0 at recv",
        "both wait first",
    ),
    ({0: [Call("a", (0, 5), 1)]}, None, "the other is not rehearsed"),
]


@pytest.mark.parametrize("calls, problem, reason", PLAYS, ids=[reason for *_, reason in PLAYS])
def test_play(calls, problem, reason):
    found = play(calls)
    assert found is None if problem is None else (found or "").startswith(problem), found


def test_who_stands_for_all():
    assert to_rehearse(ParallelSizes(dp=8)) == list(range(8))
    assert to_rehearse(ParallelSizes(pp=2, tp=4, dp=512)) == [0, 2047, 2048, 4095]
