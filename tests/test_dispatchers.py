"""Every dispatcher gives what the local one gives, outputs and every gradient; its bytes are counted by hand.

The ranks are threads with gloo groups of their own and no default group. As processes, dispatchers are tested with a
whole model in test_dispatch_config.py, test_zero.py and test_trainer.py.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads, run_threads_on_nodes

from expertmesh.kernels.grouped_swiglu import grouped_swiglu
from expertmesh.kernels.routing import Routing, route
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    Dispatcher,
    ExpertLayer,
    HierarchicalDispatcher,
    LocalDispatcher,
)
from expertmesh.parallel.nodes import Nodes
from expertmesh.parallel.wire import NATIVE, WIRES, Wire

WIDTH, HIDDEN, ZERO_COMPUTATION = 6, 5, 3


class Case(NamedTuple):
    tokens: tuple[int, ...]  # of each rank, and round again where there are more
    top_k: int
    ffn_experts: int
    favoured: tuple[int, ...]  # experts that get every token
    shunned: tuple[int, ...]  # experts that get none
    reason: str


ZC_IDS = (4, 5, 6)
CASES = [
    Case((6, 6, 6, 6), 2, 4, (), (), "random"),
    Case((7, 2, 12, 5), 2, 4, (), (), "uneven tokens"),
    Case((7, 2, 12, 5), 1, 4, (), (), "k is 1"),
    Case((7, 2, 12, 5), 4, 4, (), (), "k above the experts of a rank"),
    Case((5, 5, 5, 5), 1, 4, (2,), (), "all tokens on one expert: all others idle, one rank gets everything"),
    Case((5, 5, 5, 5), 2, 4, (), (1,), "an expert without tokens"),
    Case((5, 5, 5, 5), 2, 4, ZC_IDS, (), "all slots zero-computation: no rows anywhere"),
    Case((5, 0, 5, 3), 2, 4, (), (), "a rank without tokens still answers"),
    Case((0, 0, 0, 0), 2, 4, (), (), "no tokens at all"),
    Case((1, 0, 0, 0), 2, 4, (), (), "one token in all"),
    Case((1, 1, 1, 1), 1, 4, (), (), "one token each"),
    Case((4, 4, 4, 4), 2, 0, (), (), "no FFN experts"),
    Case((7, 2, 12, 5), 2, 8, (), (), "two experts a rank and more"),
    Case((3, 9, 1, 6), 3, 7, (), (), "shards of unlike sizes"),
    Case((3, 9, 1, 6), 2, 3, (), (), "fewer experts than ranks: some hold none"),
    Case((4, 3, 4, 3), 3, 1, (), (), "one expert in all"),
]


def tokens_of(case: Case, ranks: int) -> list[int]:
    return [case.tokens[rank % len(case.tokens)] for rank in range(ranks)]


class Batch(NamedTuple):
    """The tokens of all ranks of a group in rank order, and the weights of all experts: the same on every rank."""

    x_TD: torch.Tensor
    logits_TN: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    grad_TD: torch.Tensor


def batch_for(case: Case, ranks: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens, experts = sum(tokens_of(case, ranks)), case.ffn_experts
    bias_N = torch.zeros(experts + ZERO_COMPUTATION)
    bias_N[list(case.favoured)], bias_N[list(case.shunned)] = 20.0, -20.0
    x_TD, logits_TN, gate_up, down, grad_TD = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (
            (tokens, WIDTH),
            (tokens, experts + ZERO_COMPUTATION),
            (experts, 2 * HIDDEN, WIDTH),
            (experts, WIDTH, HIDDEN),
            (tokens, WIDTH),
        )
    )
    leaves = (x_TD, logits_TN.float() + bias_N, gate_up, down)
    return Batch(*(t.requires_grad_() for t in leaves), grad_TD)


def layer(
    dispatcher: Dispatcher,
    x_TD: torch.Tensor,
    routing: Routing,
    experts: int,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    arriving, handle = dispatcher.dispatch(x_TD, routing, ExpertLayer(0, experts))
    answers = (grouped_swiglu(r.source_XD, r.index_R, r.counts_E, gate_up, down, r.weights_R) for r in arriving)
    return dispatcher.combine(answers, handle)


KINDS = ("all_to_all", "all_gather", "hierarchical")
# In one chunk, no kind differs from another by a bit: see below.
WAYS = (("all_to_all", 1), ("all_to_all", 3), ("all_gather", 3), ("hierarchical", 3))


def make(
    kind: str, group: dist.ProcessGroup, nodes: Nodes, traffic: Traffic, chunks: int = 1, wire: Wire = NATIVE
) -> Dispatcher:
    if kind == "hierarchical":
        return HierarchicalDispatcher(group, nodes, traffic, wire, chunks)
    flat = {"all_to_all": AllToAllDispatcher, "all_gather": AllGatherDispatcher}[kind]
    return flat(group, traffic, wire, chunks, nodes.ranks_per_node)


class Bytes(NamedTuple):
    forward: int
    backward: int
    far: int  # of both
    saved_once: float  # by a crossing of each row that kept slots would have sent


def bytes_by_hand(
    kind: str, chosen: list[list[int]], case: Case, ranks: int, per_node: int, me: int, chunks: int, row_bytes: int
) -> Bytes:
    """What `me` sends, from sets of tokens: each row once there and once home, with 2 K + 1 numbers there, K home."""
    tokens, experts, K = tokens_of(case, ranks), case.ffn_experts, case.top_k
    owners = [rank for rank in range(ranks) for _ in range(tokens[rank])]
    holder = [next(r for r in range(ranks) if e < experts * (r + 1) // ranks) for e in range(experts)]
    wanted = [{holder[e] for e in slots if e < experts} for slots in chosen]
    there, home = row_bytes + 4 * (2 * K + 1), row_bytes + 4 * K
    node = [rank // per_node for rank in range(ranks)]
    hops: list[list[tuple[int, int]]] = [
        [(owner, to) for owner, goals in zip(owners, wanted, strict=True) for to in goals]
    ]
    if kind == "hierarchical" and 1 < per_node < ranks:
        # To the rank of that node with the owner's place, and from there to those who hold the experts.
        gate = lambda owner, goal: goal // per_node * per_node + owner % per_node  # noqa: E731
        hops = [
            [(o, g) for o, goals in zip(owners, wanted, strict=True) for g in {gate(o, goal) for goal in goals}],
            [(gate(o, goal), goal) for o, goals in zip(owners, wanted, strict=True) for goal in goals],
        ]
    forward = backward = far = 0
    for pairs in hops:
        for source, to in pairs:
            if source == to or me not in (source, to):
                continue
            forth, back = (there, row_bytes) if source == me else (row_bytes, home)
            if source == me and kind == "all_gather":
                forth = 0
            forward, backward = forward + forth, backward + back
            far += (forth + back) * (node[source] != node[to])
    if kind == "all_gather":
        rows = -(-max(tokens) // chunks) * chunks
        forward += (ranks - 1) * rows * there
        far += (ranks - per_node) * rows * there
    mine = [slots for owner, slots in zip(owners, chosen, strict=True) if owner == me]
    ffn = sum(e < experts for slots in mine for e in slots)
    kept = sum(len(slots) for slots in mine) - ffn
    leaving = sum(source == me != to for source, to in hops[0])
    return Bytes(forward, backward, far, kept * row_bytes * (leaving / ffn if ffn else (ranks - 1) / ranks))


class Answers(NamedTuple):
    y_TD: torch.Tensor
    gradients: dict[str, torch.Tensor]


def answers_of(
    case: Case, group: dist.ProcessGroup, dispatcher: Dispatcher, dtype: torch.dtype, training: bool = True
) -> Answers:
    """Of one rank: its tokens and its experts."""
    ranks, me, experts = group.size(), group.rank(), case.ffn_experts
    tokens = tokens_of(case, ranks)
    mine = slice(sum(tokens[:me]), sum(tokens[: me + 1]))
    held = slice(experts * me // ranks, experts * (me + 1) // ranks)
    whole = batch_for(case, ranks, dtype)
    parts = {"x": whole.x_TD[mine], "logits": whole.logits_TN[mine]}
    parts |= {"gate_up": whole.gate_up[held], "down": whole.down[held]}
    x_TD, logits_TN, gate_up, down = leaves = [part.detach().clone().requires_grad_() for part in parts.values()]
    with torch.set_grad_enabled(training):
        y_TD = layer(dispatcher, x_TD, route(logits_TN, case.top_k, "paper"), experts, gate_up, down)
    if not training:
        return Answers(y_TD, {})
    y_TD.backward(whole.grad_TD[mine])
    assert all(leaf.grad is not None for leaf in leaves)
    return Answers(y_TD.detach(), {name: leaf.grad for name, leaf in zip(parts, leaves, strict=True)})


def local_answers(case: Case, ranks: int, dtype: torch.dtype) -> list[Answers]:
    """What each rank should say: the local dispatcher's answers, cut."""
    batch, experts, tokens = batch_for(case, ranks, dtype), case.ffn_experts, tokens_of(case, ranks)
    y_TD = layer(
        LocalDispatcher(), batch.x_TD, route(batch.logits_TN, case.top_k, "paper"), experts, batch.gate_up, batch.down
    )
    y_TD.backward(batch.grad_TD)
    expected = []
    for me in range(ranks):
        mine = slice(sum(tokens[:me]), sum(tokens[: me + 1]))
        held = slice(experts * me // ranks, experts * (me + 1) // ranks)
        gradients = {"x": batch.x_TD.grad[mine], "logits": batch.logits_TN.grad[mine]}
        gradients |= {"gate_up": batch.gate_up.grad[held], "down": batch.down.grad[held]}
        expected.append(Answers(y_TD.detach()[mine], gradients))
    return expected


# Ranks, ranks per node. To connect them takes longer than all cases do: each layout is one test, and names the case.
BY_LAYOUT = pytest.mark.parametrize("ranks, per_node", [(1, 1), (2, 2), (4, 4), (4, 2), (8, 4)], ids=str)


@BY_LAYOUT
def test_every_dispatcher_equals_local_and_sends_what_it_must(ranks, per_node):
    prepared = []
    for case in CASES:
        chosen = route(batch_for(case, ranks).logits_TN, case.top_k, "paper").experts_TK.tolist()
        prepared.append((case, local_answers(case, ranks, torch.float64), chosen))

    def rank_main(group: dist.ProcessGroup, nodes: Nodes) -> None:
        me = group.rank()
        for case, expected, chosen in prepared:
            for kind, chunks in WAYS:
                what = f"{kind} in {chunks} chunks, {case.reason}"
                by_hand = bytes_by_hand(kind, chosen, case, ranks, per_node, me, chunks, WIDTH * 8)
                check(case, expected[me], by_hand, kind, chunks, group, nodes, what)

    run_threads_on_nodes(rank_main, ranks, per_node)


def check(
    case: Case,
    expected: Answers,
    by_hand: Bytes,
    kind: str,
    chunks: int,
    group: dist.ProcessGroup,
    nodes: Nodes,
    what: str,
) -> None:
    traffic = Traffic()
    dispatcher = make(kind, group, nodes, traffic, chunks)
    answers = answers_of(case, group, dispatcher, torch.float64)
    assert_close(answers.y_TD, expected.y_TD, what=f"output of {what}")
    for name, gradient in answers.gradients.items():
        assert_close(gradient, expected.gradients[name], what=f"gradient of {name} of {what}")
    crossings = 3 if kind == "all_gather" else 4
    saved = round(crossings * by_hand.saved_once)
    assert traffic.take() == (by_hand.forward + by_hand.backward, saved, by_hand.far), what

    answers = answers_of(case, group, dispatcher, torch.float64, training=False)
    assert_close(answers.y_TD, expected.y_TD, what=f"output without gradients of {what}")
    assert traffic.take()[:2] == (by_hand.forward, round((crossings - 2) * by_hand.saved_once)), what


@BY_LAYOUT
def test_the_road_changes_no_bit(ranks, per_node):
    """Outputs and every gradient, whatever the kind: all add up in one order, and experts see rows in one order."""

    def rank_main(group: dist.ProcessGroup, nodes: Nodes) -> None:
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16):
                first, *others = (answers_of(case, group, make(kind, group, nodes, Traffic()), dtype) for kind in KINDS)
                for kind, other in zip(KINDS[1:], others, strict=True):
                    assert torch.equal(other.y_TD, first.y_TD), f"output of {kind}, {case.reason}"
                    for name, gradient in other.gradients.items():
                        assert torch.equal(gradient, first.gradients[name]), f"{name} of {kind}, {case.reason}"

    run_threads_on_nodes(rank_main, ranks, per_node)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wire, bound", [("bf16", 2**-8), ("fp8", 2**-4)], ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_narrow_wire_rounds_and_counts_its_bytes(kind, wire, bound):
    """Outputs and gradients keep within a few roundings of what a row is off by; rows cost what the format says."""
    case, ranks, per_node, chunks = Case((7, 2, 12, 5), 2, 8, (), (), "narrow"), 4, 2, 2
    expected = local_answers(case, ranks, torch.float32)
    chosen = route(batch_for(case, ranks).logits_TN, case.top_k, "paper").experts_TK.tolist()
    row_bytes = {"bf16": 2 * WIDTH, "fp8": WIDTH + 4}[wire]

    def rank_main(group: dist.ProcessGroup, nodes: Nodes) -> None:
        traffic, me = Traffic(), group.rank()
        answers = answers_of(case, group, make(kind, group, nodes, traffic, chunks, WIRES[wire]), torch.float32)
        by_hand = bytes_by_hand(kind, chosen, case, ranks, per_node, me, chunks, row_bytes)
        assert traffic.take().sent == by_hand.forward + by_hand.backward
        # A number of x is rounded once on each hop, so is each sum on its way home; gradients pass all of that too.
        bounds = {"output": 4 * bound} | dict.fromkeys(answers.gradients, 8 * bound)
        for name, value in {"output": answers.y_TD, **answers.gradients}.items():
            wanted = expected[me].gradients.get(name, expected[me].y_TD)
            assert_close(value, wanted, max_error=bounds[name], rms_error=bounds[name] / 4, what=f"{name} of {kind}")
            assert not torch.equal(value, wanted)  # it was narrowed

    run_threads_on_nodes(rank_main, ranks, per_node)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_local_equals_a_loop_over_tokens(case):
    batch, experts = batch_for(case, 4), case.ffn_experts
    routing = route(batch.logits_TN, case.top_k, "paper")
    (rows,), handle = LocalDispatcher().dispatch(batch.x_TD, routing, ExpertLayer(0, experts))
    expert_of_row = torch.arange(experts).repeat_interleave(rows.counts_E)
    y_TD = LocalDispatcher().combine([rows.weighted(rows.gathered() * (1 + expert_of_row[:, None]))], handle)
    for x_D, y_D, chosen, weights in zip(batch.x_TD, y_TD, routing.experts_TK, routing.weights_TK, strict=True):
        factor = sum(w.double() * (1 + e) for e, w in zip(chosen, weights, strict=True) if e < experts)
        assert_close(y_D, factor * x_D)
    assert int(rows.counts_E.sum()) == int((routing.experts_TK < experts).sum())


def with_dropped(batch: Batch, experts: int) -> Routing:
    """Every third slot dropped, whatever it chose: id N, and a weight that nobody may use."""
    routing = route(batch.logits_TN, 2, "paper")
    dropped_TK = torch.arange(routing.chosen_TK.numel()).view_as(routing.chosen_TK) % 3 == 1
    return routing._replace(experts_TK=routing.chosen_TK.masked_fill(dropped_TK, experts + ZERO_COMPUTATION))


def part_of(routing: Routing, tokens: slice) -> Routing:
    return Routing(*(t[tokens] for t in routing))


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_slots_have_no_row_and_save_nothing(kind):
    case, world = CASES[1], 4
    batch, experts = batch_for(case, world), case.ffn_experts
    routing = with_dropped(batch, experts)
    (rows,), _ = LocalDispatcher().dispatch(batch.x_TD, routing, ExpertLayer(0, experts))
    assert len(rows.index_R) == int(rows.counts_E.sum()) == int((routing.experts_TK < experts).sum())
    assert 0 < routing.dropped_slots < routing.chosen_TK.numel()

    y_TD = layer(LocalDispatcher(), batch.x_TD, routing, experts, batch.gate_up, batch.down)
    zeroed = routing._replace(weights_TK=routing.weights_TK.masked_fill(routing.experts_TK >= experts, 0.0))
    kept = zeroed._replace(experts_TK=routing.chosen_TK)  # all slots have a row, those dropped a weight of 0
    assert_close(y_TD, layer(LocalDispatcher(), batch.x_TD, kept, experts, batch.gate_up, batch.down))

    # A dropped slot counts as none: neither sent nor saved.
    slots = [[e for e in row if e < experts + ZERO_COMPUTATION] for row in routing.experts_TK.tolist()]

    def rank_main(group: dist.ProcessGroup, nodes: Nodes) -> None:
        me = group.rank()
        first = sum(case.tokens[:me])
        mine, held = slice(first, first + case.tokens[me]), slice(experts * me // world, experts * (me + 1) // world)
        traffic = Traffic()
        dispatcher = make(kind, group, nodes, traffic)
        with torch.no_grad():
            x_TD, gate_up, down = batch.x_TD[mine], batch.gate_up[held], batch.down[held]
            y_mine_TD = layer(dispatcher, x_TD, part_of(routing, mine), experts, gate_up, down)
        assert_close(y_mine_TD, y_TD[mine])
        by_hand = bytes_by_hand(kind, slots, case, world, 2, me, 1, WIDTH * 8)
        crossings = 1 if kind == "all_gather" else 2
        assert traffic.take()[:2] == (by_hand.forward, round(crossings * by_hand.saved_once))

    run_threads_on_nodes(rank_main, world, 2)


def test_the_next_chunk_leaves_before_experts_begin():
    """And the answers to one leave before the next is looked at: seen by the bytes that have left at each moment."""
    case, chunks = CASES[0], 3

    def rank_main(group: dist.ProcessGroup) -> list[int]:
        batch, traffic = batch_for(case, 2), Traffic()
        mine = slice(6 * group.rank(), 6 * group.rank() + 6)
        dispatcher = AllToAllDispatcher(group, traffic, chunks=chunks)
        with torch.no_grad():
            routing = route(batch.logits_TN[mine] - 20 * (torch.arange(7) >= 4), 2, "paper")  # FFN experts alone
            arriving, handle = dispatcher.dispatch(batch.x_TD[mine], routing, ExpertLayer(0, 4))
            left = [traffic.sent]

            def answers():
                for rows in arriving:
                    left.append(traffic.sent)
                    yield rows.source_XD.new_zeros(len(rows.index_R), WIDTH)

            dispatcher.combine(answers(), handle)
        return [*left, traffic.sent, routing.experts_TK.tolist()]

    ranks = run_threads(rank_main, 2)
    there, home = WIDTH * 8 + 4 * 5, WIDTH * 8  # bytes of a row with its choices, and of a sum
    for me, (*left, chosen) in enumerate(ranks):
        others = ranks[1 - me][-1]

        def rows(choices: list[list[int]], holder: int) -> list[int]:  # of each chunk of two tokens
            return [sum(any(e // 2 == holder for e in slots) for slots in choices[c : c + 2]) for c in (0, 2, 4)]

        out, back = rows(chosen, 1 - me), rows(others, me)
        assert left == [
            there * out[0],
            there * (out[0] + out[1]),
            there * sum(out) + home * back[0],
            there * sum(out) + home * (back[0] + back[1]),
            there * sum(out) + home * sum(back),
        ]
