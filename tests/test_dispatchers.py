"""A parallel dispatcher gives what the local one gives: outputs and every gradient; its bytes are counted by hand.

The ranks are threads with a gloo group of their own and no default group. As processes, the same dispatcher is tested
with a whole model in test_zero.py and test_trainer.py.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads

from expertmesh.kernels.grouped_swiglu import grouped_swiglu
from expertmesh.kernels.routing import Routing, route
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import AllToAllDispatcher, Dispatcher, ExpertLayer, LocalDispatcher

WIDTH, HIDDEN, ZERO_COMPUTATION = 6, 5, 3


class Case(NamedTuple):
    tokens: tuple[int, int, int, int]  # of each rank; two ranks take the first two
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
]


class Batch(NamedTuple):
    """The tokens of all ranks of a group in rank order, and the weights of all experts: the same on every rank."""

    x_TD: torch.Tensor
    logits_TN: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    grad_TD: torch.Tensor


def batch_for(case: Case, ranks: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens, experts = sum(case.tokens[:ranks]), case.ffn_experts
    bias_N = torch.zeros(experts + ZERO_COMPUTATION)
    bias_N[list(case.favoured)], bias_N[list(case.shunned)] = 20.0, -20.0
    x_TD, logits_TN, gate_up, down, grad_TD = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
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
    rows, handle = dispatcher.dispatch(x_TD, routing, ExpertLayer(0, experts))
    answers_RD = grouped_swiglu(rows.source_XD, rows.index_R, rows.counts_E, gate_up, down, rows.weights_R)
    return dispatcher.combine(answers_RD, handle)


def bytes_by_hand(chosen: list[list[int]], owner_of_token: list[int], ranks: int, me: int, experts: int):
    """Bytes that `me` sends in one direction, and the bytes that one crossing of each of its saved slots would be."""
    out = back = kept = stays = 0
    for owner, slots in zip(owner_of_token, chosen, strict=True):
        for expert in slots:
            holder = expert * ranks // experts if expert < experts else None
            out += owner == me and holder not in (me, None)
            back += holder == me and owner != me
            kept += owner == me and holder is None
            stays += owner == me and holder == me
    remote = out / (out + stays) if out + stays else (ranks - 1) / ranks
    row_bytes = WIDTH * torch.float64.itemsize
    return (out + back) * row_bytes, kept * remote * row_bytes


def check(case: Case, group: dist.ProcessGroup) -> None:
    ranks, me = group.size(), group.rank()
    batch, experts = batch_for(case, ranks), case.ffn_experts
    routing = route(batch.logits_TN, case.top_k, "paper")
    y_TD = layer(LocalDispatcher(), batch.x_TD, routing, experts, batch.gate_up, batch.down)
    y_TD.backward(batch.grad_TD)

    first = sum(case.tokens[:me])
    my_tokens = slice(first, first + case.tokens[me])
    my_experts = slice(experts * me // ranks, experts * (me + 1) // ranks)
    whole = batch_for(case, ranks)
    x_TD, logits_TN = (t.detach()[my_tokens].requires_grad_() for t in whole[:2])
    gate_up, down = (t.detach()[my_experts].requires_grad_() for t in whole[2:4])
    traffic = Traffic()
    dispatcher = AllToAllDispatcher(group, traffic)
    owners = [rank for rank in range(ranks) for _ in range(case.tokens[rank])]
    one_way, saved_once = bytes_by_hand(routing.experts_TK.tolist(), owners, ranks, me, experts)

    with torch.no_grad():  # serving: rows cross twice
        layer(dispatcher, x_TD, route(logits_TN, case.top_k, "paper"), experts, gate_up, down)
    assert traffic.take() == (one_way, round(2 * saved_once))

    y_mine_TD = layer(dispatcher, x_TD, route(logits_TN, case.top_k, "paper"), experts, gate_up, down)
    assert traffic.sent == one_way
    y_mine_TD.backward(batch.grad_TD[my_tokens])
    assert traffic.take() == (2 * one_way, round(4 * saved_once))

    assert_close(y_mine_TD, y_TD[my_tokens], what="output")
    gradients = {
        "x": (x_TD, batch.x_TD, my_tokens),
        "logits": (logits_TN, batch.logits_TN, my_tokens),
        "gate_up": (gate_up, batch.gate_up, my_experts),
        "down": (down, batch.down, my_experts),
    }
    for name, (mine, all_of_it, part) in gradients.items():
        assert mine.grad is not None and all_of_it.grad is not None, f"no gradient of {name}"
        assert_close(mine.grad, all_of_it.grad[part], what=f"gradient of {name}")


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_all_to_all_equals_local(case, world):
    run_threads(lambda group: check(case, group), world)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_local_equals_a_loop_over_tokens(case):
    batch, experts = batch_for(case, 4), case.ffn_experts
    routing = route(batch.logits_TN, case.top_k, "paper")
    rows, handle = LocalDispatcher().dispatch(batch.x_TD, routing, ExpertLayer(0, experts))
    expert_of_row = torch.arange(experts).repeat_interleave(rows.counts_E)
    y_TD = LocalDispatcher().combine(rows.weighted(rows.gathered() * (1 + expert_of_row[:, None])), handle)
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


@pytest.mark.parametrize("world", [2, 4])
def test_dropped_slots_have_no_row_and_save_nothing(world):
    case = CASES[1]
    batch, experts = batch_for(case, world), case.ffn_experts
    routing = with_dropped(batch, experts)
    rows, _ = LocalDispatcher().dispatch(batch.x_TD, routing, ExpertLayer(0, experts))
    assert len(rows.index_R) == int(rows.counts_E.sum()) == int((routing.experts_TK < experts).sum())
    assert 0 < routing.dropped_slots < routing.chosen_TK.numel()

    y_TD = layer(LocalDispatcher(), batch.x_TD, routing, experts, batch.gate_up, batch.down)
    zeroed = routing._replace(weights_TK=routing.weights_TK.masked_fill(routing.experts_TK >= experts, 0.0))
    kept = zeroed._replace(experts_TK=routing.chosen_TK)  # all slots have a row, those dropped a weight of 0
    assert_close(y_TD, layer(LocalDispatcher(), batch.x_TD, kept, experts, batch.gate_up, batch.down))

    owners = [rank for rank in range(world) for _ in range(case.tokens[rank])]
    # A dropped slot counts as none: neither sent nor saved.
    slots = [[e for e in row if e < experts + ZERO_COMPUTATION] for row in routing.experts_TK.tolist()]

    def rank_main(group: dist.ProcessGroup) -> None:
        me = group.rank()
        first = sum(case.tokens[:me])
        mine, held = slice(first, first + case.tokens[me]), slice(experts * me // world, experts * (me + 1) // world)
        traffic = Traffic()
        dispatcher = AllToAllDispatcher(group, traffic)
        with torch.no_grad():
            x_TD, gate_up, down = batch.x_TD[mine], batch.gate_up[held], batch.down[held]
            y_mine_TD = layer(dispatcher, x_TD, part_of(routing, mine), experts, gate_up, down)
        assert_close(y_mine_TD, y_TD[mine])
        one_way, saved_once = bytes_by_hand(slots, owners, world, me, experts)
        assert traffic.take() == (one_way, round(2 * saved_once))

    run_threads(rank_main, world)
