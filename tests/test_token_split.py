"""Tokens into and out of halves whose weights are split: what arrives, and the gradients, on threads as ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from numerics import assert_close
from ranks import run_threads

from expertmesh.parallel.token_split import TokenSplit

CASES = [
    (2, 6, (3,), "two ranks"),
    (3, 3, (2,), "one token a rank"),
    (2, 0, (3,), "no tokens: a rank without sequences"),
    (4, 8, (2, 2), "more than one dimension of a token"),
]


@pytest.mark.parametrize("ranks, tokens, width, reason", CASES, ids=[reason for *_, reason in CASES])
def test_a_split_half_is_the_whole_one(ranks, tokens, width, reason):
    """y = sum over ranks of w_r * f(x), on all tokens: cut, entered, left, and back through both."""
    torch.manual_seed(0)
    x_TD = torch.randn(tokens, *width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(ranks, dtype=torch.float64, requires_grad=True)
    grad_TD = torch.randn(tokens, *width, dtype=torch.float64)
    y_TD = sum(weight * x_TD.sin() for weight in weights)
    y_TD.backward(grad_TD)

    def rank_main(group: dist.ProcessGroup) -> tuple[torch.Tensor, ...]:
        split = TokenSplit(group)
        mine_TD = split.mine(x_TD).detach().requires_grad_()
        weight = weights[group.rank()].detach().requires_grad_()
        mine_y_TD = split.reduce_scatter(weight * split.gather(mine_TD).sin())
        mine_y_TD.backward(split.mine(grad_TD))
        return mine_y_TD.detach(), mine_TD.grad, weight.grad

    answers, x_grads, weight_grads = zip(*run_threads(rank_main, ranks), strict=True)
    assert all(len(answer) == tokens // ranks for answer in answers)
    assert_close(torch.cat(answers), y_TD, what="answers")
    assert_close(torch.cat(x_grads), x_TD.grad, what="gradient of tokens")
    assert_close(torch.stack(weight_grads), weights.grad, what="gradient of weights")


def test_integers_are_gathered_in_rank_order():
    def rank_main(group: dist.ProcessGroup) -> torch.Tensor:
        return TokenSplit(group).gather(torch.tensor([[group.rank(), 7]]))

    for got in run_threads(rank_main, 3):
        assert got.tolist() == [[0, 7], [1, 7], [2, 7]]


def test_one_rank_has_all_tokens():
    x_TD, alone = torch.randn(3, 2), TokenSplit()
    assert alone.gather(x_TD) is alone.reduce_scatter(x_TD) is alone.mine(x_TD) is x_TD
