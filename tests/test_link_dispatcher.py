"""Rows that cross links come back as what `LocalDispatcher` says, over any number of workers; and bytes are counted."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from threading import Thread
from time import sleep

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close

from expertmesh.kernels.routing import Routing
from expertmesh.kernels.rows import Rows
from expertmesh.kernels.zero_computation import ZeroComputation
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatch_config import WireName
from expertmesh.parallel.dispatchers import ExpertLayer, LocalDispatcher
from expertmesh.parallel.exchange import FORMS, Answered, Layout, tell
from expertmesh.parallel.expert_server import Experts, ExpertServer
from expertmesh.parallel.link import Link, LinkBroken, Listener, Seat, connect
from expertmesh.parallel.link_dispatcher import DISPATCHERS, Shared
from expertmesh.parallel.placement import expert_shard
from expertmesh.parallel.timeline import Timeline, Turns
from expertmesh.parallel.wire import WIRES

WIDTH, EXPERTS = 6, 5
LAYER = ExpertLayer(2, EXPERTS, 0.3)
WAIT = timedelta(seconds=20)


def apply(rows: Rows, first: int) -> torch.Tensor:
    """Expert e says (e + 1) x + e."""
    e_R = torch.repeat_interleave(torch.arange(len(rows.counts_E)) + first, rows.counts_E)[:, None]
    return (e_R + 1) * rows.gathered() + e_R


class Split:
    """`workers` FFN workers in threads, and a dispatcher that is linked to them."""

    def __init__(self, form: str, workers: int, wire: WireName = "native", dtype: torch.dtype = torch.float32) -> None:
        store = dist.HashStore()
        store.set_timeout(WAIT)
        layout = Layout(WIRES[wire], WIDTH, dtype)
        self.asked = [0] * workers

        def serve(ffn: int) -> None:
            shard = expert_shard(EXPERTS, ffn, workers)

            def compute(layer: int, rows: Rows, width: float) -> torch.Tensor:
                assert (layer, width) == (LAYER.layer, LAYER.width)
                self.asked[ffn] += 1
                return apply(rows, shard.start).to(dtype)

            server = ExpertServer(Experts(compute, lambda layer: shard, "cpu"), FORMS[form], layout)
            server.serve(Listener(store, Seat(ffn)), 1)

        self.threads = [Thread(target=serve, args=(ffn,), daemon=True) for ffn in range(workers)]
        for thread in self.threads:
            thread.start()
        self.links = [connect(store, 0, Seat(ffn), 0, WAIT) for ffn in range(workers)]
        self.timeline, self.traffic = Timeline(keep=True), Traffic()
        self.turns = Turns(self.timeline)
        self.dispatcher = DISPATCHERS[form](self.links, 0, Shared(layout, self.turns, self.traffic))

    @torch.no_grad()
    def __call__(self, x_TD: torch.Tensor, routing: Routing, zero: ZeroComputation | None = None) -> torch.Tensor:
        with self.turns.turn(0):
            arriving, handle = self.dispatcher.dispatch(x_TD, routing, LAYER)
            assert not arriving
            return self.dispatcher.combine((), handle, zero)

    def close(self) -> None:
        for link in self.links:
            link.close()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


@torch.no_grad()
def local(x_TD: torch.Tensor, routing: Routing, zero: ZeroComputation | None = None) -> torch.Tensor:
    (rows,), handle = LocalDispatcher().dispatch(x_TD, routing, LAYER)
    return LocalDispatcher().combine([apply(rows, 0).to(x_TD.dtype)], handle, zero)


def routing_of(experts: list[list[int]], top_k: int = 2) -> Routing:
    experts_TK = torch.tensor(experts, dtype=torch.int64).view(len(experts), top_k)
    weights_TK = torch.rand(experts_TK.shape, generator=torch.Generator().manual_seed(7)) + 0.1
    logits_TN = torch.zeros(len(experts), EXPERTS + 3)
    return Routing(experts_TK, weights_TK, logits_TN, logits_TN, experts_TK)


# Ids from 5 up cost nothing and stay.
ROUTINGS = [
    (routing_of([[0, 3], [4, 1], [2, 0], [1, 2]]), "two each"),
    (routing_of([[0, 1], [1, 0], [0, 1]]), "all on one worker"),
    (routing_of([[6, 3], [5, 7], [4, 6]]), "some choices cost nothing, and all of one token"),
    (routing_of([[5, 6], [7, 5]]), "nothing to send"),
    (routing_of([[2, 4]]), "one token"),
    (routing_of([]), "no tokens"),
    (routing_of([[3], [3], [0], [6]], 1), "k = 1"),
    (routing_of([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]], 5), "every expert"),
]
EACH = pytest.mark.parametrize("routing, reason", ROUTINGS, ids=[reason for _, reason in ROUTINGS])


@EACH
@pytest.mark.parametrize("workers", [1, 2, 3, 7], ids="{} workers".format)
@pytest.mark.parametrize("form", ["routed", "broadcast"])
def test_equals_local(form, workers, routing, reason):
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(len(routing.experts_TK), WIDTH, generator=generator)
    mix, constant = torch.randn(1, 2, WIDTH, generator=generator), torch.randn(1, WIDTH, generator=generator)
    zero = ZeroComputation(x_TD, routing.experts_TK, EXPERTS, mix, constant, 1)
    split = Split(form, workers)
    for _ in range(2):
        for with_zero in (None, zero):
            got_TD, want_TD = split(x_TD, routing, with_zero), local(x_TD, routing, with_zero)
            if form == "routed":
                assert torch.equal(got_TD, want_TD), "not a bit differs"
            assert_close(got_TD, want_TD)
    split.close()
    chosen = {int(e) for e in routing.experts_TK.flatten() if e < EXPERTS}
    for ffn, asked in enumerate(split.asked):
        shard = expert_shard(EXPERTS, ffn, workers)
        is_asked = bool(chosen & set(shard)) if form == "routed" else bool(chosen and len(shard))
        assert asked == 4 * is_asked, "whoever holds nothing of it is not asked"


@pytest.mark.parametrize("form", ["routed", "broadcast"])
def test_bfloat16(form):
    routing, _ = ROUTINGS[0]
    x_TD = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
    split = Split(form, 2, dtype=torch.bfloat16)
    got_TD = split(x_TD, routing)
    assert got_TD.dtype == torch.bfloat16
    if form == "routed":
        assert torch.equal(got_TD, local(x_TD, routing))
    assert_close(got_TD, local(x_TD, routing))
    split.close()


@pytest.mark.parametrize("form", ["routed", "broadcast"])
def test_fp8_on_the_wire(form):
    """Tokens arrive as what FP8 makes of them: the answers are those to rounded tokens."""
    routing, _ = ROUTINGS[0]
    x_TD = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
    rounded_TD = WIRES["fp8"].unpack(WIRES["fp8"].pack(x_TD), torch.float32)
    split = Split(form, 2, wire="fp8")
    assert_close(split(x_TD, routing), local(rounded_TD, routing))
    split.close()


def test_bytes():
    """Routing 2 over two workers: shards [0, 1] and [2, 3, 4]; of 6 choices 2 cross, to worker 1, from 2 tokens."""
    routing, _ = ROUTINGS[2]
    x_TD = torch.randn(3, WIDTH)
    there, back, number = 4 * WIDTH, 4 * WIDTH, 4
    routed = Split("routed", 2)
    routed(x_TD, routing)
    assert routed.traffic.sent == 2 * (there + number) + 2 * back and routed.traffic.saved == 4 * (there + back)
    routed.close()
    broadcast = Split("broadcast", 2)
    broadcast(x_TD, routing)
    assert broadcast.traffic.sent == 2 * 2 * (there + 2 * 2 * number + back)
    assert broadcast.traffic.saved == routed.traffic.saved
    broadcast.close()
    narrow = Split("routed", 2, wire="fp8")
    narrow(x_TD, routing)
    assert narrow.traffic.sent == 2 * (WIDTH + 4 + number) + 2 * back
    narrow.close()
    shared, _ = ROUTINGS[1]
    once = Split("routed", 1)
    once(x_TD, shared)
    assert once.traffic.sent == 3 * there + 6 * (number + back), "a token with two experts there goes once"
    once.close()


def test_a_round_trip_is_on_the_timeline():
    routing, _ = ROUTINGS[0]
    split = Split("routed", 2)
    split(torch.randn(4, WIDTH), routing)
    split.close()
    spans = split.timeline.spans()
    for ffn in range(2):
        first, wait, work, last = (
            [span for span in spans if span.track == track]
            for track in (f"wire {ffn}", f"wait {ffn}", f"ffn {ffn}", f"wire {ffn}")
        )
        trip = [first[0], wait[0], work[0], last[1]]
        assert all(a.end == b.start for a, b in zip(trip, trip[1:], strict=False)), "one after the other, no gap"
        assert all(span.layer == LAYER.layer and span.start <= span.end for span in trip)
    attention = [span for span in spans if span.track == "attention"]
    assert len(attention) == 2 and attention[0].end <= attention[1].start, "before and after the wait"


@pytest.mark.parametrize("form", ["routed", "broadcast"])
@pytest.mark.parametrize("moment", ["before it is asked", "while it computes", "while it answers"])
def test_an_ffn_worker_dies_and_the_next_one_answers(form, moment):
    """The layer's answer is what it is without the death, and so are those after it; the worker came later by 0.2 s."""
    store = dist.HashStore()
    store.set_timeout(WAIT)
    layout, shard = Layout(WIRES["native"], WIDTH, torch.float32), range(EXPERTS)
    lives: list[Listener] = []

    def live(dies: bool) -> None:
        listener = Listener(store, Seat(0))
        lives.append(listener)
        link, _ = listener.accept()
        with suppress(ConnectionError):  # at the end of the test
            answer_until_death(dies, link)
        listener.close()
        link.close()
        if dies:
            sleep(0.2)
            Thread(target=live, args=(False,), daemon=True).start()

    def answer_until_death(dies: bool, link: Link) -> None:
        while True:
            if dies and moment == "before it is asked":
                break
            work = FORMS[form].hear(link, layout, lambda layer: shard)
            if dies and moment == "while it computes":
                break
            answer = work.finish(apply(work.rows, 0))
            if dies:
                link.send([bytes(8)])  # a part of the head
                break
            tell(link, answer, Answered(0, 0))

    Thread(target=live, args=(True,), daemon=True).start()
    link = connect(store, 0, Seat(0), 0, WAIT, patience=20)
    turns = Turns(Timeline())
    dispatcher = DISPATCHERS[form]([link], 0, Shared(layout, turns, Traffic()))
    routing, _ = ROUTINGS[0]
    x_TD = torch.randn(len(routing.experts_TK), WIDTH, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        with turns.turn(0), torch.no_grad():
            _, handle = dispatcher.dispatch(x_TD, routing, LAYER)
            assert_close(dispatcher.combine((), handle), local(x_TD, routing))
    assert len(lives) == 2
    link.close()


def test_patience_ends():
    store = dist.HashStore()
    store.set_timeout(WAIT)
    listener = Listener(store, Seat(0))
    link = connect(store, 0, Seat(0), 0, WAIT, patience=0.2)
    listener.accept()[0].close()
    listener.close()
    turns = Turns(Timeline())
    layout = Layout(WIRES["native"], WIDTH, torch.float32)
    dispatcher = DISPATCHERS["routed"]([link], 0, Shared(layout, turns, Traffic()))
    routing, _ = ROUTINGS[0]
    with pytest.raises(LinkBroken, match="FFN worker 0 is gone"), turns.turn(0), torch.no_grad():
        _, handle = dispatcher.dispatch(torch.zeros(len(routing.experts_TK), WIDTH), routing, LAYER)
        dispatcher.combine((), handle)
