"""The sums of the balance losses against float64, and the losses that come out of them against those files' own."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels import router_sums as module
from expertmesh.kernels.balance_loss import balance_loss, heterogeneous_eta
from expertmesh.kernels.mutual_information import mutual_information_loss
from expertmesh.kernels.router_sums import router_sums, router_sums_ref
from expertmesh.kernels.z_loss import z_loss


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
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def losses(case: Case, sums, logits_TN: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each loss from the sums, and from the probabilities by its own file."""
    T, N, K = case.tokens, case.experts, case.top_k
    p_TN, means_N = logits_TN.softmax(-1), sums.probabilities_N / T
    eta_N, even_N = heterogeneous_eta(N - 1, 1, 0.75), torch.full((N,), float(N))
    marginal = (means_N * means_N.detach().log()).sum()
    return {
        "heterogeneous": ((eta_N * sums.counts_N / T * means_N).sum(), balance_loss(p_TN, sums.counts_N, T, eta_N)),
        "switch": (N / K * (sums.counts_N / T * means_N).sum(), balance_loss(p_TN, sums.counts_N, T, even_N / K)),
        "gshard": (N * (sums.firsts_N / T * means_N).sum(), balance_loss(p_TN, sums.firsts_N, T, even_N)),
        "z": (sums.z / T, z_loss(logits_TN)),
        "mutual information": (marginal - sums.information / T, mutual_information_loss(p_TN, p_TN.mean(0))),
    }


@pytest.mark.parametrize("name", ["heterogeneous", "switch", "gshard", "z", "mutual information"])
def test_each_loss_comes_out_of_the_sums(name):
    logits_TN, chosen_TK = inputs_for(CASES[4])
    got, want = losses(CASES[4], router_sums(logits_TN, chosen_TK), logits_TN)[name]
    assert_close(got, want, what=name)
    (gradient,), (expected,) = torch.autograd.grad(got, logits_TN), torch.autograd.grad(want, logits_TN)
    assert ((gradient - expected).abs() < 1e-6).all()


def test_a_saturated_router_has_finite_sums_and_gradients():
    logits_TN = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    sums = router_sums(logits_TN, torch.tensor([[0]]))
    (gradient,) = torch.autograd.grad(sums.information, logits_TN)
    assert sums.information.item() == 0 and torch.equal(gradient, torch.zeros(1, 3))
