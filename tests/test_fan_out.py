"""Copies and sums, against sets of tokens and a loop."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.parallel.fan_out import plan_copies


class Case(NamedTuple):
    experts_TK: list[list[int]]
    bounds: list[int]
    per_node: int
    chunks: int
    reason: str


CASES = [
    Case([[0, 1], [2, 0], [3, 2]], [0, 2, 4], 2, 1, "the drawing in fan_out.py"),
    Case([[0, 1], [2, 0], [3, 2]], [0, 2, 4], 1, 2, "in chunks of two and one"),
    Case([[0, 9], [9, 9], [8, 3]], [0, 2, 4], 2, 1, "choices that are held nowhere"),
    Case([[0, 5], [2, 4], [3, 7]], [2, 4, 6], 2, 1, "a node's ranks: experts below and above are held elsewhere"),
    Case([[0, 1], [1, 2], [0, 2]], [0, 0, 1, 1, 3], 4, 1, "ranks without an expert, first and in the middle"),
    Case([[0, 2, 4], [1, 3, 7], [5, 6, 7], [0, 1, 2]], [0, 2, 4, 6, 8], 2, 1, "two nodes"),
    Case([[0, 2, 4], [1, 3, 7], [5, 6, 7], [0, 1, 2], [9, 9, 9]], [0, 2, 4, 6, 8], 2, 3, "two nodes, three chunks"),
    Case([[1, 0]], [0, 1, 2], 2, 4, "more chunks than tokens"),
    Case([[0]], [0, 1], 1, 1, "one token, one rank"),
]


def fans_of(case: Case, experts_TK: torch.Tensor):
    each = -(-len(experts_TK) // case.chunks)
    tokens = [min(each, max(0, len(experts_TK) - chunk * each)) for chunk in range(case.chunks)]
    plan = plan_copies(experts_TK, case.bounds, case.per_node, case.chunks, each)
    return plan, plan.cut(plan.copies_CR.tolist(), plan.node_copies_C.tolist(), tokens), tokens


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_who_goes_where(case):
    experts_TK = torch.tensor(case.experts_TK)
    ranks = len(case.bounds) - 1
    held = [range(first, last) for first, last in zip(case.bounds, case.bounds[1:], strict=False)]
    plan, fans, tokens = fans_of(case, experts_TK)
    assert int(plan.slots) == sum(e in range(case.bounds[0], case.bounds[-1]) for row in case.experts_TK for e in row)

    T, width = len(experts_TK), 3
    x_TD = torch.randn(T, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for fan, x_D, experts in zip(fans, x_TD.split(tokens), experts_TK.split(tokens), strict=True):
        wanted = [[t for t, chosen in enumerate(experts.tolist()) if set(chosen) & set(of)] for of in held]
        assert fan.splits == [len(of_rank) for of_rank in wanted]
        copies_UD = fan.copies(x_D)
        assert torch.equal(copies_UD, torch.cat([x_D[of_rank] for of_rank in wanted]))

        factor_U = torch.arange(1.0, 1 + len(copies_UD), dtype=torch.float64)
        sums_TD, start = torch.zeros_like(x_D), 0
        for rank in range(ranks):
            for token in wanted[rank]:
                sums_TD[token] += factor_U[start] * x_D[token]
                start += 1
        rows_UD = (copies_UD * factor_U[:, None]).requires_grad_()
        assert_close(fan.sums(rows_UD.detach()), sums_TD)
        y_TD = fan.add_up(rows_UD, torch.ones(len(x_D), experts.shape[1]), None)
        assert_close(y_TD, sums_TD)
        y_TD.backward(x_D)  # the gradient of a sum is a copy of the token's
        assert torch.equal(rows_UD.grad, copies_UD)


@pytest.mark.parametrize("chunks", [1, 2])
def test_no_tokens(chunks):
    case = Case([], [0, 2, 4, 6], 1, chunks, "")
    _, fans, _ = fans_of(case, torch.empty(0, 2, dtype=torch.int64))
    for fan in fans:
        assert fan.splits == [0, 0, 0]
        assert fan.sums(fan.copies(torch.empty(0, 5))).shape == (0, 5)


def test_a_node_is_added_up_first():
    """In float32, 1 + 2^-24 is 1: so (1 + e) + (e + e) is 1 + 2 e by nodes, and 1 rank by rank."""
    e = 2.0**-24
    rows_UD = torch.tensor([[1.0], [e], [e], [e]])
    for per_node, wanted in ((2, 1 + 2 * e), (4, 1.0)):
        case = Case([[0, 1, 2, 3]], [0, 1, 2, 3, 4], per_node, 1, "")
        _, (fan,), _ = fans_of(case, torch.tensor(case.experts_TK))
        assert fan.sums(rows_UD).item() == fan.add_up(rows_UD, torch.ones(1, 4), None).item() == wanted
