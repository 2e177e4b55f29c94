"""The mutual-information loss: its extremes, its gradient through a softmax, and the batch cut in two."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.mutual_information import mutual_information_loss, mutual_information_loss_ref
from expertmesh.kernels.router_sums import RouterSums, router_sums

EXPERTS = 4
ONE = torch.eye(EXPERTS, dtype=torch.float64)

EXTREMES = [
    (torch.full((6, EXPERTS), 1 / EXPERTS, dtype=torch.float64), 0.0, "uniform: nothing is known"),
    (ONE.repeat(3, 1), -math.log(EXPERTS), "sure and balanced: the least there is"),
    (ONE[:1].repeat(6, 1), 0.0, "all tokens sure of one expert"),
    (ONE[:1], 0.0, "one token"),
]


def sums_of(logits_TN: torch.Tensor) -> RouterSums:
    return router_sums(logits_TN, torch.zeros(len(logits_TN), 1, dtype=torch.int64))


def of_whole(logits_TN: torch.Tensor) -> torch.Tensor:
    sums = sums_of(logits_TN)
    return mutual_information_loss(sums, sums.means_N)


@pytest.mark.parametrize("p_TN, expected, reason", EXTREMES, ids=[reason for *_, reason in EXTREMES])
def test_extremes(p_TN, expected, reason):
    assert of_whole(p_TN.log()).item() == pytest.approx(expected, abs=1e-7)  # epsilon in the logarithm of the means


def some(tokens: int, experts: int, spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * experts)
    return (spread * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize(
    "tokens, experts, reason", [(1, 5, "one token"), (7, 2, "two experts"), (33, 5, "odd sizes"), (5, 1, "one expert")]
)
def test_value_and_gradient_through_a_softmax_are_those_of_the_definition(tokens, experts, reason):
    """There the gradient goes through the means too: it is the same for all experts of a token."""
    logits_TN = some(tokens, experts)
    got, want = of_whole(logits_TN), mutual_information_loss_ref(logits_TN.softmax(-1))
    assert got.item() == pytest.approx(want.item(), abs=1e-7)
    (mine,), (theirs,) = (torch.autograd.grad(loss, logits_TN) for loss in (got, want))
    assert (mine - theirs).abs().max() < 1e-7 and (tokens == 1 or experts == 1 or theirs.abs().max() > 1e-3)


def test_the_means_get_no_gradient():
    """They are those of all ranks, and autograd does not reach the others."""
    sums = sums_of(some(7, 3))
    means_N = sums.means_N.detach().requires_grad_()
    assert torch.autograd.grad(mutual_information_loss(sums, means_N), means_N, allow_unused=True) == (None,)


def test_never_above_zero():
    for seed in range(20):
        logits_TN = 3 * torch.randn(11, 6, generator=torch.Generator().manual_seed(seed))
        assert of_whole(logits_TN).item() <= 1e-6


def test_two_halves_with_the_means_of_both_are_the_whole():
    logits_TN = some(24, 5)
    whole, means_N = of_whole(logits_TN), sums_of(logits_TN).means_N
    halves = torch.stack([mutual_information_loss(sums_of(half), means_N) for half in logits_TN.chunk(2)])
    assert_close(halves.mean(), whole)
    assert (halves - whole).abs().min() > 1e-3, "halves that differ"
    (mine,), (theirs,) = (torch.autograd.grad(loss, logits_TN) for loss in (halves.mean(), whole))
    assert_close(mine, theirs)


def test_a_probability_that_rounded_to_zero_has_a_finite_gradient():
    """exp(-200) is 0 in float32, and the slope of p log p there is infinite."""
    logits_TN = torch.tensor([[0.0, -200.0, 1.0], [0.5, -200.0, 0.0]], requires_grad=True)
    assert logits_TN.softmax(-1)[0, 1] == 0
    of_whole(logits_TN).backward()
    assert torch.isfinite(logits_TN.grad).all() and logits_TN.grad[0, 0] != 0


def test_no_tokens():
    logits_TN = torch.zeros(0, 3, requires_grad=True)
    loss = mutual_information_loss(sums_of(logits_TN), torch.zeros(3))
    loss.backward()
    assert loss.item() == 0 and logits_TN.grad.shape == (0, 3)
