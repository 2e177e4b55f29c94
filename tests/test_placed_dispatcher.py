"""Wherever experts lie, in however many copies, the layer gives what it gives with all of them in one place."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads

from expertmesh.kernels.grouped_swiglu import grouped_swiglu
from expertmesh.kernels.routing import Routing, route
from expertmesh.parallel.all_to_all import Traffic
from expertmesh.parallel.dispatchers import (
    AllGatherDispatcher,
    AllToAllDispatcher,
    Dispatcher,
    ExpertLayer,
    LocalDispatcher,
)
from expertmesh.parallel.placed_dispatcher import PlacedDispatcher, place_routing
from expertmesh.parallel.placement import Placement, place_on_fewest, place_slots

EXPERTS, ZERO_COMPUTATION, WIDTH, HIDDEN, LAYER = 4, 3, 6, 5, 7
CASES = [
    (Placement.contiguous(4, 2), (5, 5), 2, "as without a placement"),
    (Placement(4, 2, (3, 0, 2, 1)), (5, 3), 2, "other ranks, other order"),
    (Placement(4, 2, (2, 0, 3, 2, 1, 0)), (7, 4), 2, "two experts have copies"),
    (Placement(4, 2, (2, 0, 3, 1, 3, 2, 1, 0)), (7, 4), 1, "all experts on all ranks, k = 1"),
    (Placement(4, 2, (2, 0, 3, 2, 1, 0)), (1, 0), 2, "one token in all"),
    (Placement(4, 2, (2, 0, 3, 2, 1, 0)), (0, 0), 2, "no tokens"),
]


def layer(dispatcher: Dispatcher, x_TD: torch.Tensor, routing: Routing, weights: list[torch.Tensor]) -> torch.Tensor:
    arriving, handle = dispatcher.dispatch(x_TD, routing, ExpertLayer(LAYER, EXPERTS))
    answers = (grouped_swiglu(r.source_XD, r.index_R, r.counts_E, *weights, r.weights_R) for r in arriving)
    return dispatcher.combine(answers, handle)


DISPATCHERS = {
    "all to all": lambda group: AllToAllDispatcher(group, Traffic()),
    "all to all in three chunks": lambda group: AllToAllDispatcher(group, Traffic(), chunks=3),
    "all gather": lambda group: AllGatherDispatcher(group, Traffic()),
}


@pytest.mark.parametrize("choice", [place_slots, place_on_fewest], ids=lambda choice: choice.__name__)
@pytest.mark.parametrize("inner", DISPATCHERS.values(), ids=DISPATCHERS)
@pytest.mark.parametrize("placement, tokens, top_k, reason", CASES, ids=[reason for *_, reason in CASES])
def test_placed_equals_local(placement, tokens, top_k, reason, inner, choice):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x_TD, logits_TN, grad_TD = (draw(sum(tokens), n) for n in (WIDTH, EXPERTS + ZERO_COMPUTATION, WIDTH))
    weights = [draw(EXPERTS, 2 * HIDDEN, WIDTH).requires_grad_(), draw(EXPERTS, WIDTH, HIDDEN).requires_grad_()]
    x_TD.requires_grad_()
    y_TD = layer(LocalDispatcher(), x_TD, route(logits_TN, top_k, "paper"), weights)
    y_TD.backward(grad_TD)

    def rank_main(group: dist.ProcessGroup):
        mine = slice(*((0, tokens[0]), (tokens[0], sum(tokens)))[group.rank()])
        held = list(placement.held(group.rank()))
        here = [weight.detach()[held].requires_grad_() for weight in weights]
        x_mine_TD = x_TD.detach()[mine].requires_grad_()
        dispatcher = PlacedDispatcher(inner(group), {LAYER: placement}, group.rank(), choice)
        y_mine_TD = layer(dispatcher, x_mine_TD, route(logits_TN[mine], top_k, "paper"), here)
        y_mine_TD.backward(grad_TD[mine])
        assert_close(y_mine_TD, y_TD[mine], what="output")
        assert_close(x_mine_TD.grad, x_TD.grad[mine], what="gradient of x")
        return held, [weight.grad for weight in here]

    summed = [torch.zeros_like(weight) for weight in weights]
    for held, grads in run_threads(rank_main, 2):
        for total, grad in zip(summed, grads, strict=True):
            total.index_add_(0, torch.tensor(held), grad)  # copies: their gradients add up
    for total, weight in zip(summed, weights, strict=True):
        assert_close(total, weight.grad, what="gradient of an expert, summed over its copies")


@pytest.mark.parametrize("choice", [place_slots, place_on_fewest], ids=lambda choice: choice.__name__)
def test_dropped_slots_stay_dropped(choice):
    placement = CASES[2][0]
    routing = route(torch.randn(6, EXPERTS + ZERO_COMPUTATION, generator=torch.Generator().manual_seed(2)), 2, "paper")
    placed = place_routing(routing, placement, 0, choice)
    assert placed.chosen_TK is placed.experts_TK and placed.dropped_slots == 0
    every_third = torch.arange(12).view(6, 2) % 3 == 0
    dropping = routing._replace(experts_TK=routing.chosen_TK.masked_fill(every_third, EXPERTS + ZERO_COMPUTATION))
    placed = place_routing(dropping, placement, 0, choice)
    assert placed.dropped_slots == 4
    assert (placed.experts_TK[every_third] == placement.slots + ZERO_COMPUTATION).all()


def test_a_layer_without_a_placement_is_left_alone():
    routing = route(torch.randn(3, EXPERTS), 2, "paper")
    x_TD = torch.randn(3, WIDTH)
    placed = PlacedDispatcher(LocalDispatcher(), {LAYER + 1: CASES[1][0]}, 0)
    (rows,), _ = placed.dispatch(x_TD, routing, ExpertLayer(LAYER, EXPERTS))
    (expected,), _ = LocalDispatcher().dispatch(x_TD, routing, ExpertLayer(LAYER, EXPERTS))
    assert torch.equal(rows.index_R, expected.index_R) and torch.equal(rows.counts_E, expected.counts_E)
