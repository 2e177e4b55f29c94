"""The balance loss against a loop over tokens in float64, its known minimum, and its corners."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.balance_loss import balance_loss, heterogeneous_eta
from expertmesh.kernels.router_sums import RouterSums, router_sums
from expertmesh.kernels.routing import expert_counts, route


def sums_of(p_TN: torch.Tensor) -> RouterSums:
    """What the loss reads of these probabilities."""
    nothing = torch.zeros(())
    return RouterSums(p_TN.sum(0), nothing, nothing, nothing, nothing, len(p_TN))


CASES = [
    (1, 4, 2, 1, "one token"),
    (40, 8, 1, 4, "k is 1"),
    (33, 7, 3, 6, "odd sizes"),
    (16, 4, 2, 4, "FFN experts only"),
    (16, 4, 2, 0, "zero-computation experts only"),
]


@pytest.mark.parametrize(("tokens", "experts", "top_k", "ffn"), [c[:4] for c in CASES], ids=[c[4] for c in CASES])
def test_is_equation_7(tokens, experts, top_k, ffn):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens)).requires_grad_()
    routing = route(logits, top_k, "paper")
    eta_N = heterogeneous_eta(ffn, experts - ffn, 0.75)
    sums = router_sums(routing.scores_TN, routing.experts_TK)
    loss = balance_loss(sums, sums.counts_N, tokens, eta_N)

    wide = logits.detach().double().requires_grad_()
    expected = wide.new_zeros(())
    for i in range(experts):
        chosen = sum(i in row for row in routing.experts_TK.tolist())
        mean_probability = sum(wide[t].softmax(dim=0)[i] for t in range(tokens)) / tokens
        expected = expected + (1 if i < ffn else 0.75) * (chosen / tokens) * mean_probability
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close(loss, expected)
    (got,), (want,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, wide)
    assert (got - want).abs().max() < 1e-7


def test_one_probability_gets_eta_times_fraction_over_tokens():
    """By hand: 4 tokens, eta 0.5, 3 of them chose expert 1, so the gradient of its probabilities is 0.5 * 3/4 / 4."""
    probabilities_TN = torch.full((4, 2), 0.5, requires_grad=True)
    loss = balance_loss(sums_of(probabilities_TN), torch.tensor([1, 3]), 4, torch.tensor([1.0, 0.5]))
    assert loss.item() == 0.5 * (1 / 4) + 0.5 * 0.5 * (3 / 4)
    (grad,) = torch.autograd.grad(loss, probabilities_TN)
    assert torch.equal(grad, torch.tensor([1 / 16, 3 / 32]).expand(4, 2))


@pytest.mark.parametrize(("ffn", "others", "tau"), [(8, 4, 0.75), (16, 4, 0.1), (32, 8, 0.5), (8, 0, 0.75)])
def test_minimum_where_probabilities_are_inverse_to_eta(ffn, others, tau):
    """With f = K P the minimum K / (N_FFN + N_ZC / tau) lies at P proportional to 1/eta, and nowhere lower."""
    top_k, eta_N = 2, heterogeneous_eta(ffn, others, tau).double()

    def loss_at(p_N):
        # Counts are numbers of slots; a million tokens make K * P * tokens as good as whole.
        tokens = 10**6
        return balance_loss(sums_of(p_N[None]), (top_k * p_N * tokens).round().long(), tokens, eta_N).item()

    best = (1 / eta_N) / (1 / eta_N).sum()
    minimum = top_k / (ffn + others / tau)
    assert abs(loss_at(best) - minimum) < 1e-5 * minimum
    for seed in range(20):
        noise = torch.randn(ffn + others, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert loss_at((best.log() + 0.3 * noise).softmax(dim=0)) > minimum


def test_the_published_example():
    """MoE++ 0.6B/(8+4)E at tau 0.75: P is 0.075 for FFN experts and 0.1 for the others, and the loss 0.15."""
    probabilities_TN = torch.tensor([[0.075] * 8 + [0.1] * 4])
    counts_N = torch.tensor([150] * 8 + [200] * 4)
    assert_close(
        balance_loss(sums_of(probabilities_TN), counts_N, 1000, heterogeneous_eta(8, 4, 0.75)), torch.tensor(0.15)
    )


def test_tau_one_treats_all_experts_alike():
    assert torch.equal(heterogeneous_eta(8, 4, 1.0), torch.ones(12))
    assert torch.equal(heterogeneous_eta(2, 3, 0.25), torch.tensor([1, 1, 0.25, 0.25, 0.25]))


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_tau_must_be_positive(tau):
    with pytest.raises(ValueError, match="tau"):
        heterogeneous_eta(2, 2, tau)


@pytest.mark.parametrize(("counts", "tokens"), [([0, 0, 0], 0), ([3, 2, 1], 3)], ids=["nowhere", "on this rank"])
def test_no_tokens_no_loss(counts, tokens):
    probabilities_TN = torch.zeros(0, 3, requires_grad=True)
    loss = balance_loss(sums_of(probabilities_TN), torch.tensor(counts), tokens, heterogeneous_eta(2, 1, 0.5))
    loss.backward()
    assert loss.item() == 0 and probabilities_TN.grad.shape == (0, 3)


def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch():
    """Counts over all ranks, probabilities of each: what data-parallel training computes."""
    routing = route(torch.randn(24, 6, generator=torch.Generator().manual_seed(4)), 2, "paper")
    counts_N, eta_N = expert_counts(routing.experts_TK, 6), heterogeneous_eta(4, 2, 0.75)
    p_TN = routing.scores_TN.softmax(-1)
    whole = balance_loss(sums_of(p_TN), counts_N, 24, eta_N)
    parts = [balance_loss(sums_of(part), counts_N, 24, eta_N) for part in p_TN.chunk(3)]
    assert_close(torch.stack(parts).mean(), whole)
