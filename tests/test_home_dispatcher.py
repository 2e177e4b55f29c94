"""With copies of some experts on every rank a layer gives what it gives without, outputs and every gradient; its bytes
are counted by hand. The ranks are threads with gloo groups of their own."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads_on_nodes
from torch import nn

from expertmesh.kernels.grouped_swiglu import grouped_swiglu
from expertmesh.kernels.routing import Routing, route
from expertmesh.kernels.rows import Rows
from expertmesh.parallel.all_to_all import Lane, Traffic
from expertmesh.parallel.dispatchers import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    Dispatcher,
    ExpertLayer,
    HierarchicalDispatcher,
    LocalDispatcher,
)
from expertmesh.parallel.expert_copies import ExpertCopies
from expertmesh.parallel.home_dispatcher import HomeDispatcher
from expertmesh.parallel.nodes import Nodes, far_ranks
from expertmesh.parallel.placed_dispatcher import PlacedDispatcher
from expertmesh.parallel.placement import Placement
from expertmesh.parallel.wire import NATIVE, WIRES

WIDTH, HIDDEN, ZERO_COMPUTATION, LAYER = 6, 5, 3, 7
EXPERT_BYTES = 3 * WIDTH * HIDDEN * 8  # float64


class Case(NamedTuple):
    tokens: tuple[int, ...]  # of each of four ranks
    top_k: int
    experts: int
    copied: tuple[int, ...]
    favoured: tuple[int, ...]  # experts that get every token
    shunned: tuple[int, ...]  # experts that get none
    reason: str
    experts_P: tuple[int, ...] | None = None  # where they lie; None: in order


CASES = [
    Case((7, 2, 12, 5), 2, 8, (2,), (), (), "one copy"),
    Case((7, 2, 12, 5), 2, 8, (5, 2, 3), (), (), "two of one rank, one of another"),
    Case((7, 2, 12, 5), 2, 4, (2, 1), (1,), (), "all of what a rank holds"),
    Case((5, 5, 5, 5), 1, 4, (2,), (2,), (), "all tokens on one expert: nothing travels but weights"),
    Case((5, 5, 5, 5), 2, 4, (1, 3), (), (1,), "a copy that nobody chose"),
    Case((5, 5, 5, 5), 2, 4, (0,), (4, 5, 6), (), "zero-computation experts alone"),
    Case((5, 0, 5, 3), 2, 8, (7,), (), (), "a rank without tokens"),
    Case((0, 0, 0, 0), 2, 4, (0,), (), (), "no tokens at all"),
    Case((3, 9, 1, 6), 2, 3, (2,), (), (), "a rank without experts"),
    Case((3, 9, 1, 6), 2, 4, (0, 1, 2, 3), (), (), "copies of all"),
    Case((7, 2, 12, 5), 2, 8, (5, 2), (), (), "experts in another order", (3, 5, 0, 7, 2, 6, 4, 1)),
]


class Experts(nn.Module):
    """Named weights, some experts in their first dimension."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Parameter(gate_up.clone()), nn.Parameter(down.clone())

    def forward(self, rows: Rows, context: None) -> torch.Tensor:
        return grouped_swiglu(rows.source_XD, rows.index_R, rows.counts_E, self.gate_up, self.down, rows.weights_R)


def layer(
    dispatcher: Dispatcher, x_TD: torch.Tensor, routing: Routing, held: Experts, case: Case, copies
) -> torch.Tensor:
    holders = [*([copies.set_out(held)] if copies else []), *[held] * 3]
    asked = ExpertLayer(LAYER, case.experts, copied=copies.experts if copies else ())
    arriving, handle = dispatcher.dispatch(x_TD, routing, asked)
    return dispatcher.combine((experts(rows, None) for experts, rows in zip(holders, arriving, strict=False)), handle)


def drawn(case: Case) -> dict[str, torch.Tensor]:
    """Tokens of all ranks in rank order, and all experts; every fifth choice is dropped."""
    generator = torch.Generator().manual_seed(1)
    T, E = sum(case.tokens), case.experts
    shapes = {"x": (T, WIDTH), "logits": (T, E + ZERO_COMPUTATION), "gate_up": (E, 2 * HIDDEN, WIDTH)}
    shapes |= {"down": (E, WIDTH, HIDDEN), "grad": (T, WIDTH)}
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    found["logits"][:, list(case.favoured)] += 20
    found["logits"][:, list(case.shunned)] -= 20
    return found


def routed(logits_TN: torch.Tensor, case: Case) -> Routing:
    routing = route(logits_TN, case.top_k, "paper")
    dropped_TK = torch.arange(routing.chosen_TK.numel()).view_as(routing.chosen_TK) % 5 == 4
    return routing._replace(experts_TK=routing.chosen_TK.masked_fill(dropped_TK, logits_TN.shape[1]))


class Answers(NamedTuple):
    y_TD: torch.Tensor
    x_TD: torch.Tensor  # gradients from here on
    logits_TN: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def answers_of(dispatcher: Dispatcher, case: Case, tokens: list[slice], held: list[int], copies=None) -> Answers:
    """Of some ranks' tokens; each rank drops every fifth of its own choices."""
    data = drawn(case)
    (mine,) = (slice(tokens[0].start, tokens[-1].stop),)
    x_TD, logits_TN = data["x"][mine].requires_grad_(), data["logits"][mine].requires_grad_()
    each = [routed(logits_TN[part.start - mine.start : part.stop - mine.start], case) for part in tokens]
    routing = Routing(*(torch.cat(parts) for parts in zip(*each, strict=True)))
    experts = Experts(data["gate_up"][held], data["down"][held])
    y_TD = layer(dispatcher, x_TD, routing, experts, case, copies)
    y_TD.backward(data["grad"][mine])
    return Answers(y_TD.detach(), x_TD.grad, logits_TN.grad, experts.gate_up.grad, experts.down.grad)


def tokens_of(case: Case) -> list[slice]:
    starts = [sum(case.tokens[:rank]) for rank in range(4)]
    return [slice(start, start + count) for start, count in zip(starts, case.tokens, strict=True)]


def make(kind: str, group: dist.ProcessGroup, nodes: Nodes, traffic: Traffic, chunks: int, wire: str) -> Dispatcher:
    if kind == "hierarchical":
        return HierarchicalDispatcher(group, nodes, traffic, WIRES[wire], chunks)
    flat = {"all_to_all": AllToAllDispatcher, "all_gather": AllGatherDispatcher}[kind]
    return flat(group, traffic, WIRES[wire], chunks, nodes.ranks_per_node)


WAYS = [("all_to_all", 1), ("all_to_all", 3), ("all_gather", 2), ("hierarchical", 2)]


def test_copies_change_no_answer_and_no_gradient():
    expected = [answers_of(LocalDispatcher(), case, tokens_of(case), list(range(case.experts))) for case in CASES]

    def rank_main(group: dist.ProcessGroup, nodes: Nodes) -> None:
        for case, whole in zip(CASES, expected, strict=True):
            placement = Placement(case.experts, 4, case.experts_P or tuple(range(case.experts)))
            held, mine = list(placement.held(group.rank())), tokens_of(case)[group.rank()]
            for kind, chunks in WAYS:
                traffic = Traffic()
                home = HomeDispatcher(make(kind, group, nodes, traffic, chunks, "native"))
                dispatcher = PlacedDispatcher(home, {LAYER: placement}, group.rank())
                lane = Lane(group, NATIVE, traffic, far_ranks(group, nodes.ranks_per_node))
                copies = ExpertCopies(LAYER, case.copied, placement, lane)
                got, what = answers_of(dispatcher, case, [mine], held, copies), f"{kind} in {chunks}, {case.reason}"
                for name in ("y_TD", "x_TD", "logits_TN"):
                    assert_close(getattr(got, name), getattr(whole, name)[mine], what=f"{name} of {what}")
                for name in ("gate_up", "down"):
                    assert_close(getattr(got, name), getattr(whole, name)[held], what=f"{name} of {what}")

    run_threads_on_nodes(rank_main, 4, 2)


def test_bytes_of_copies_by_hand():
    """What a pass sends: rows that did not choose a copy, weights by their owners, gradients by all others."""
    cases = [case for case in CASES if case.experts_P is None]

    def sent(case: Case, group: dist.ProcessGroup, nodes: Nodes, copied: tuple[int, ...]) -> tuple[int, int]:
        """In all, and to the other node."""
        traffic, placement = Traffic(), Placement.contiguous(case.experts, 4)
        lane = Lane(group, NATIVE, traffic, far_ranks(group, nodes.ranks_per_node))
        copies = ExpertCopies(LAYER, copied, placement, lane) if copied else None
        home, me = HomeDispatcher(make("all_to_all", group, nodes, traffic, 1, "native")), group.rank()
        answers_of(home, case, [tokens_of(case)[me]], list(placement.held(me)), copies)
        taken = traffic.take()
        return taken.sent, taken.far

    def rank_main(group: dist.ProcessGroup, nodes: Nodes) -> list[tuple[int, int, int, int]]:
        return [sent(case, group, nodes, case.copied) + sent(case, group, nodes, ()) for case in cases]

    ranks = run_threads_on_nodes(rank_main, 4, 2)
    for number, case in enumerate(cases):
        with_copies, far_with, without, far_without = (sum(rank[number][i] for rank in ranks) for i in range(4))
        holder = [next(r for r in range(4) if e < case.experts * (r + 1) // 4) for e in range(case.experts)]

        def pairs(copied: tuple[int, ...], case=case, holder=holder) -> list[tuple[int, int]]:
            """Of each row that travels, whence and where."""
            found = []
            for rank, tokens in enumerate(tokens_of(case)):
                for chosen in routed(drawn(case)["logits"][tokens], case).experts_TK.tolist():
                    goals = {holder[e] for e in chosen if e < case.experts and e not in copied}
                    found += [(rank, goal) for goal in goals if goal != rank]
            return found

        row = (
            4 * WIDTH * 8 + 4 * (2 * case.top_k + 1) + 4 * case.top_k
        )  # there, home, gradients; choices, their weights'
        weights = 2 * EXPERT_BYTES * len(case.copied)
        assert without == row * len(pairs(())), case.reason
        assert with_copies == row * len(pairs(case.copied)) + 3 * weights, case.reason
        assert far_without == row * sum(a // 2 != b // 2 for a, b in pairs(())), case.reason
        assert far_with == row * sum(a // 2 != b // 2 for a, b in pairs(case.copied)) + 2 * weights, case.reason


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_what_stays_at_home_is_not_rounded(wire):
    """With all tokens on a copy a narrow wire changes nothing; weights travel as they are."""
    case = CASES[3]
    whole = answers_of(LocalDispatcher(), case, tokens_of(case), list(range(case.experts)))

    def rank_main(group: dist.ProcessGroup, nodes: Nodes) -> None:
        placement, me = Placement.contiguous(case.experts, 4), group.rank()
        copies = ExpertCopies(LAYER, case.copied, placement, Lane(group, NATIVE, Traffic(), (False,) * 4))
        home = HomeDispatcher(make("all_to_all", group, nodes, Traffic(), 1, wire))
        got = answers_of(home, case, [tokens_of(case)[me]], list(placement.held(me)), copies)
        assert_close(got.y_TD, whole.y_TD[tokens_of(case)[me]])
        assert_close(got.down, whole.down[me : me + 1])

    run_threads_on_nodes(rank_main, 4, 2)


def test_slots_that_stay_at_home_count_as_saved_by_nobody():
    """Those of zero-computation experts do, at the rate of a batch of which nothing travels."""
    case = Case((5, 5, 5, 5), 2, 4, (2,), (2, 4), (), "half of all slots at home, half without cost")

    def rank_main(group: dist.ProcessGroup, nodes: Nodes) -> None:
        placement, me, traffic = Placement.contiguous(case.experts, 4), group.rank(), Traffic()
        copies = ExpertCopies(LAYER, case.copied, placement, Lane(group, NATIVE, traffic, (False,) * 4))
        home = HomeDispatcher(make("all_to_all", group, nodes, traffic, 1, "native"))
        answers_of(home, case, [tokens_of(case)[me]], list(placement.held(me)), copies)
        free = int((routed(drawn(case)["logits"][tokens_of(case)[me]], case).experts_TK == 4).sum())
        assert traffic.take().saved == free * 3 * WIDTH * 8  # 3 of 4 ranks hold other experts; 4 crossings

    run_threads_on_nodes(rank_main, 4, 2)
