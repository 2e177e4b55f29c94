"""An FFN worker gives each question the answer that it would get alone, whoever else asks and in whatever order."""

from __future__ import annotations

import random
import threading
import time
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close

from expertmesh.kernels.rows import Rows
from expertmesh.parallel.dispatchers import ExpertLayer
from expertmesh.parallel.exchange import FORMS, BroadcastParts, Layout, RoutedParts, hear_answer
from expertmesh.parallel.expert_server import Experts, ExpertServer, together_rows
from expertmesh.parallel.link import Link, LinkBroken, Listener, Seat, connect, naming
from expertmesh.parallel.wire import WIRES

WIDTH, EXPERTS, HELD = 6, 9, range(3, 7)
LAYOUT = Layout(WIRES["native"], WIDTH, torch.float32)
WAIT = timedelta(seconds=20)


def experts_ref(layer: int, rows: Rows, width: float = 1.0) -> torch.Tensor:
    """Expert e of layer l says width (l + 1) (e + 1) x."""
    factors_R = torch.repeat_interleave(torch.arange(len(HELD)) + 1, rows.counts_E) * (layer + 1) * width
    return rows.gathered() * factors_R[:, None]


class Server:
    """A server and its links, in this process."""

    def __init__(self, form: str, links: int, layout: Layout = LAYOUT, compute=experts_ref) -> None:
        store = dist.HashStore()
        store.set_timeout(WAIT)
        listener = Listener(store, Seat(0))
        server = ExpertServer(Experts(compute, lambda layer: HELD, "cpu"), FORMS[form], layout)
        self.failure: BaseException | None = None

        def serve() -> None:
            try:
                server.serve(listener, links)
            except BaseException as error:
                self.failure = error

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        self.links = [connect(store, a, Seat(0), 0, WAIT) for a in range(links)]

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.thread.join(20)
        assert not self.thread.is_alive(), "it ends when nobody is left"


def routed(generator: torch.Generator, tokens: int, rows: int) -> RoutedParts:
    experts_R = torch.randint(0, len(HELD), (rows,), generator=generator).sort().values
    index_R = torch.randint(0, max(tokens, 1), (rows,), generator=generator)
    counts_E = torch.bincount(experts_R, minlength=len(HELD))
    x_UD = torch.randn(tokens, WIDTH, generator=generator)
    return RoutedParts(x_UD, index_R.to(torch.int32), counts_E.to(torch.int32))


def ask(
    link: Link, form: str, layer: int, parts, rows: int, layout: Layout = LAYOUT, width: float = 1.0
) -> torch.Tensor:
    FORMS[form].ask(link, ExpertLayer(layer, EXPERTS, width), parts, layout)
    into = torch.full((rows, WIDTH), torch.nan)
    hear_answer(link, into)
    return into


@pytest.mark.parametrize("tokens, rows", [(1, 1), (5, 5), (3, 9), (4, 1)], ids=["one", "one each", "three each", "few"])
def test_a_routed_question(tokens, rows):
    server, parts = Server("routed", 1), routed(torch.Generator().manual_seed(1), tokens, rows)
    want = experts_ref(2, Rows(parts.x_UD, parts.index_R.long(), parts.counts_E.long()))
    assert torch.equal(ask(server.links[0], "routed", 2, parts, rows), want)
    server.close()


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("form", ["routed", "broadcast"])
def test_tokens_are_rounded_on_the_wire_and_answers_are_not(wire, form):
    layout, generator = Layout(WIRES[wire], WIDTH, torch.float32), torch.Generator().manual_seed(1)
    x_UD = torch.randn(4, WIDTH, generator=generator)
    rounded_UD = WIRES[wire].unpack(WIRES[wire].pack(x_UD), torch.float32)
    server = Server(form, 1, layout)
    if form == "routed":
        counts = torch.tensor([0, 4, 0, 0], dtype=torch.int32)
        parts = RoutedParts(x_UD, torch.arange(4, dtype=torch.int32), counts)
    else:
        parts = BroadcastParts(x_UD, torch.full((4, 1), 4, dtype=torch.int32), torch.ones(4, 1))
    assert torch.equal(ask(server.links[0], form, 0, parts, 4, layout), 2 * rounded_UD)
    assert not torch.equal(rounded_UD, x_UD)
    server.close()


def test_a_broadcast_question():
    """Choices of other workers' experts, of none and of no expert at all add nothing here."""
    experts_UK = torch.tensor([[3, 4], [2, 7], [6, 12], [5, 5]], dtype=torch.int32)
    weights_UK = torch.tensor([[1.0, 0.5], [1.0, 1.0], [0.25, 9.0], [0.5, 0.5]])
    x_UD = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    server = Server("broadcast", 1)
    got_UD = ask(server.links[0], "broadcast", 1, BroadcastParts(x_UD, experts_UK, weights_UK), 4)
    factors_U = torch.tensor([2 * 1 + 0.5 * 4, 0.0, 0.25 * 8, 6.0])
    assert_close(got_UD, factors_U[:, None] * x_UD)
    server.close()


@pytest.mark.parametrize("form", ["routed", "broadcast"])
def test_many_ask_at_once(form):
    """Six links, each with a history of its own, some at a part of the width; slow, so that questions pile up."""
    together: list[int] = []

    def slow(layer: int, rows: Rows, width: float) -> torch.Tensor:
        together.append(len(rows.source_XD))
        time.sleep(0.002)
        return experts_ref(layer, rows, width)

    server, errors = Server(form, 6, compute=slow), []

    def history(seed: int) -> None:
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        for _ in range(25):
            layer, tokens, width = draw.randint(0, 1), draw.randint(1, 4), draw.choice([1.0, 0.3])
            if form == "routed":
                count = draw.randint(1, 6)
                parts = routed(generator, tokens, count)
                want = experts_ref(layer, Rows(parts.x_UD, parts.index_R.long(), parts.counts_E.long()), width)
            else:
                count = tokens
                chosen = torch.randint(3, 7, (tokens, 1), generator=generator)
                parts = BroadcastParts(
                    torch.randn(tokens, WIDTH, generator=generator), chosen.to(torch.int32), torch.ones(tokens, 1)
                )
                want = parts.x_UD * (chosen - 2) * (layer + 1) * width
            try:
                assert_close(ask(server.links[seed], form, layer, parts, count, width=width), want)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=history, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]
    server.close()
    assert len(together) < 120, "of 150 questions some were answered together"


def test_a_link_that_ends_leaves_the_others():
    server = Server("routed", 2)
    server.links[0].close()
    parts = routed(torch.Generator().manual_seed(1), 2, 3)
    assert ask(server.links[1], "routed", 0, parts, 3).isfinite().all()
    server.close()
    assert server.failure is None


@pytest.mark.parametrize("fails", [False, True], ids=["at the end", "after an error"])
def test_no_thread_is_left(fails):
    """One that ends with the process, and drops tensors then, aborts it."""

    def compute(layer: int, rows: Rows, width: float) -> torch.Tensor:
        if fails:
            raise RuntimeError("out of memory")
        return experts_ref(layer, rows, width)

    def use() -> None:
        links = [connect(store, attention, Seat(0), 0, WAIT) for attention in range(3)]
        FORMS["routed"].ask(links[0], ExpertLayer(0, EXPERTS), routed(torch.Generator().manual_seed(1), 2, 2), LAYOUT)
        if not fails:  # else two links stay open
            hear_answer(links[0], torch.empty(2, WIDTH))
            for link in links:
                link.close()

    for _ in range(20):
        store, others = dist.HashStore(), set(threading.enumerate())
        store.set_timeout(WAIT)
        server = ExpertServer(Experts(compute, lambda layer: HELD, "cpu"), FORMS["routed"], LAYOUT)
        user = threading.Thread(target=use)
        user.start()
        with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
            server.serve(Listener(store, Seat(0)), 3)
        left = set(threading.enumerate()) - others - {user}
        user.join()
        assert not left


def test_experts_that_fail_close_the_link_and_are_told_at_the_end():
    def failing(layer: int, rows: Rows, width: float) -> torch.Tensor:
        raise RuntimeError("out of memory")

    server = Server("routed", 1, compute=failing)
    with pytest.raises(LinkBroken, match="FFN worker 0 is gone"), naming(0):
        ask(server.links[0], "routed", 0, routed(torch.Generator().manual_seed(1), 2, 3), 3)
    server.close()
    assert str(server.failure) == "out of memory"


@pytest.mark.parametrize("sizes", [[(2, 3)], [(2, 3), (1, 4)], [(1, 0), (3, 5), (2, 2)]], ids=["1", "2", "one empty"])
def test_rows_together(sizes):
    """Each row keeps its token and its expert, and finds its way back."""
    generator = torch.Generator().manual_seed(5)
    parts = [routed(generator, tokens, rows) for tokens, rows in sizes]
    several = [Rows(p.x_UD, p.index_R.long(), p.counts_E.long()) for p in parts]
    rows, order_R = together_rows(several)
    answers_RD = experts_ref(0, rows)
    if order_R is not None:
        answers_RD = torch.empty_like(answers_RD).index_copy_(0, order_R, answers_RD)
    assert torch.equal(answers_RD, torch.cat([experts_ref(0, one) for one in several]))
