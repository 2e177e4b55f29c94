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


def bytes_by_hand(experts_TK: torch.Tensor, owner_of_token: list[int], ranks: int, me: int, experts: int):
    """Bytes that `me` sends in one direction, and the bytes that one crossing of each of its saved slots would be."""
    out = back = kept = stays = 0
    for owner, chosen in zip(owner_of_token, experts_TK.tolist(), strict=True):
        for expert in chosen:
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
    one_way, saved_once = bytes_by_hand(routing.experts_TK, owners, ranks, me, experts)

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
