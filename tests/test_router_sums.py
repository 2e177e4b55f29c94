"""The sums that the losses are made of against float64, the sums against loops over tokens, and the z-loss by hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import router_sums as module
from expertmesh.kernels.router_sums import router_sums, router_sums_ref


class Case(NamedTuple):
    tokens: int
    experts: int
    top_k: int
    reason: str


CASES = [
    Case(0, 4, 2, "no tokens"),
    Case(1, 4, 2, "one token"),
    Case(9, 5, 1, "k is 1"),
    Case(6, 1, 1, "a single expert"),
    Case(33, 13, 3, "odd sizes"),
    Case(130, 64, 2, "several tiles of tokens, the last not full"),
]


@pytest.fixture(params=[False, True], ids=["torch", "triton"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setattr(module, "by_triton", lambda tensor: request.param)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN, so that a number nobody wrote shows
    yield
    torch.use_deterministic_algorithms(False)


def inputs_for(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(case.tokens)
    logits_TN = 2 * torch.randn(case.tokens, case.experts, generator=generator)
    return logits_TN.requires_grad_(), logits_TN.detach().topk(case.top_k, dim=1).indices


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_sums_and_gradient(case, sigmoid):
    logits_TN, chosen_TK = inputs_for(case)
    wide_TN = logits_TN.detach().double().requires_grad_()
    got, want = router_sums(logits_TN, chosen_TK, sigmoid), router_sums_ref(wide_TN, chosen_TK, sigmoid)
    assert torch.equal(got.counts_N, want.counts_N) and torch.equal(got.firsts_N, want.firsts_N)
    assert got.counts_N.dtype == got.firsts_N.dtype == torch.int64
    for what in ("probabilities_N", "z", "information"):
        assert_close(getattr(got, what), getattr(want, what), what=what, max_error=1e-5, rms_error=1e-5)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator) for t in got[:3]]
    (gradient,) = torch.autograd.grad(got[:3], logits_TN, grads)
    (expected,) = torch.autograd.grad(want[:3], wide_TN, [g.double() for g in grads])
    assert ((gradient - expected).abs() < 2e-5).all()
    again = router_sums(logits_TN, chosen_TK, sigmoid)
    assert all(torch.equal(a, b) for a, b in zip(got[:5], again[:5], strict=True))


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_the_sums_are_those_of_a_loop_over_tokens(case, sigmoid):
    logits_TN, chosen_TK = inputs_for(case)
    counts, firsts, p_N = [0] * case.experts, [0] * case.experts, [0.0] * case.experts
    z = information = 0.0
    for logits, chosen in zip(logits_TN.tolist(), chosen_TK.tolist(), strict=True):
        e = [1 / (1 + math.exp(-x)) if sigmoid else math.exp(x) for x in logits]
        firsts[chosen[0]] += 1
        for n in range(case.experts):
            p = e[n] / sum(e)
            p_N[n] += p
            information += p * math.log(p)
            counts[n] += chosen.count(n)
        z += math.log(sum(math.exp(x) for x in logits)) ** 2
    sums = router_sums(logits_TN, chosen_TK, sigmoid)
    assert (sums.counts_N.tolist(), sums.firsts_N.tolist(), sums.tokens) == (counts, firsts, case.tokens)
    T = max(case.tokens, 1)
    got = torch.cat([sums.means_N, sums.z_loss[None], sums.entropy[None]])
    want = torch.tensor([*(p / T for p in p_N), z / T, -information / T], dtype=torch.float64)
    assert_close(got, want, max_error=1e-5, rms_error=1e-5)


def test_large_logits_cost_their_square_and_do_not_overflow():
    sums = router_sums(torch.full((3, 1), 200.0), torch.zeros(3, 1, dtype=torch.int64))
    assert sums.z_loss == pytest.approx(200.0**2)


def test_the_z_loss_draws_logits_together_where_their_sum_is_too_large():
    logits_TN = torch.tensor([[3.0, 1.0]], requires_grad=True)
    router_sums(logits_TN, torch.tensor([[0]])).z_loss.backward()
    assert (logits_TN.grad > 0).all()


def test_a_saturated_router_has_finite_sums_and_gradients():
    logits_TN = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    sums = router_sums(logits_TN, torch.tensor([[0]]))
    (gradient,) = torch.autograd.grad(sums.information, logits_TN)
    assert sums.information.item() == 0 and torch.equal(gradient, torch.zeros(1, 3))
