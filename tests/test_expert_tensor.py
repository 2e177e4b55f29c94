"""Experts cut along their hidden units over ranks give what whole ones give: outputs, every gradient, bytes by hand."""

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
from expertmesh.parallel.expert_tensor import ExpertTensorDispatcher

WIDTH, HIDDEN, EXPERTS, ZERO_COMPUTATION = 6, 12, 4, 3


class Case(NamedTuple):
    tokens: tuple[int, ...]  # of each rank
    top_k: int
    favoured: tuple[int, ...]  # experts that get every token
    reason: str


CASES = [
    Case((6, 6), 2, (), "two ranks"),
    Case((7, 2, 5), 2, (), "three ranks, uneven tokens"),
    Case((4, 0), 2, (), "a rank without tokens computes the other's rows"),
    Case((1, 1), 1, (), "a token each, k is 1"),
    Case((0, 0), 2, (), "no tokens at all"),
    Case((5, 3), 1, (2,), "all on one expert: the others get none"),
    Case((5, 3), 2, (4, 5), "all slots zero-computation: no rows anywhere"),
]


def answer(
    dispatcher: Dispatcher, x_TD: torch.Tensor, routing: Routing, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    arriving, handle = dispatcher.dispatch(x_TD, routing, ExpertLayer(0, EXPERTS))
    answers = (grouped_swiglu(*rows[:3], gate_up, down, rows.weights_R) for rows in arriving)
    return dispatcher.combine(answers, handle)


def leaves_for(case: Case) -> list[torch.Tensor]:
    generator, tokens = torch.Generator().manual_seed(1), sum(case.tokens)
    shapes = [(tokens, WIDTH), (tokens, EXPERTS + ZERO_COMPUTATION), (EXPERTS, 2 * HIDDEN, WIDTH)]
    x_TD, logits_TN, gate_up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (*shapes, (EXPERTS, WIDTH, HIDDEN))
    )
    logits_TN[:, list(case.favoured)] += 20
    return [t.requires_grad_() for t in (x_TD, logits_TN.float(), gate_up, down)]


@pytest.mark.parametrize("inner", ["local", "all-to-all"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_cut_experts_answer_as_whole_ones(case, inner):
    x_TD, logits_TN, gate_up, down = leaves = leaves_for(case)
    grad_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole_TD = answer(LocalDispatcher(), x_TD, route(logits_TN, case.top_k, "paper"), gate_up, down)
    whole_TD.backward(grad_TD)
    ranks = len(case.tokens)

    def rank_main(group: dist.ProcessGroup) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        me, cut, traffic = group.rank(), HIDDEN // ranks, Traffic()
        units = slice(me * cut, (me + 1) * cut)
        gate_EFD, up_EFD = gate_up.detach().chunk(2, dim=1)
        parts = [
            *(t.detach().split(case.tokens)[me] for t in (x_TD, logits_TN)),
            torch.cat([gate_EFD[:, units], up_EFD[:, units]], dim=1),
            down.detach()[:, :, units].contiguous(),
        ]
        mine = [part.clone().requires_grad_() for part in parts]
        within: Dispatcher = LocalDispatcher() if inner == "local" else AllToAllDispatcher(alone(), Traffic())
        dispatcher = ExpertTensorDispatcher(within, group, traffic)
        y_TD = answer(dispatcher, mine[0], route(mine[1], case.top_k, "paper"), *mine[2:])
        y_TD.backward(grad_TD.split(case.tokens)[me])
        return y_TD.detach(), [t.grad for t in mine], traffic.sent

    answers, gradients, sent = zip(*run_threads(rank_main, ranks), strict=True)
    assert_close(torch.cat(answers), whole_TD, what="answers")
    x_grads, logit_grads, gate_up_grads, down_grads = zip(*gradients, strict=True)
    gates, ups = zip(*(grad.chunk(2, dim=1) for grad in gate_up_grads), strict=True)
    together = [torch.cat(x_grads), torch.cat(logit_grads), torch.cat([*gates, *ups], 1), torch.cat(down_grads, 2)]
    for name, got, leaf in zip(("x", "logits", "gate_up", "down"), together, leaves, strict=True):
        assert_close(got, leaf.grad, what=name)

    # A row goes to each other rank; from each its part of the answer comes; and so do both gradients.
    slots = [(route(part, case.top_k, "paper").experts_TK < EXPERTS).sum() for part in logits_TN.split(case.tokens)]
    assert sum(sent) == sum(map(int, slots)) * (ranks - 1) * 4 * WIDTH * torch.float64.itemsize


def alone() -> dist.ProcessGroup:
    """A group of this thread alone: experts that are cut, and not shared out."""
    return run_threads(lambda group: group, 1)[0]
