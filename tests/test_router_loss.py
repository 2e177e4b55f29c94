"""A balance loss over sequences, one token at a time: each by itself, split over ranks or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close

from expertmesh.kernels.routing import Routing, route, route_sigmoid
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.router_loss import sequence_balance_loss, sums_of_sequences

SEQUENCES, LENGTH, FFN = 3, 6, 4


def config_of(**changes: Any) -> MoEConfig:
    return MoEConfig(ffn_experts=FFN, zero_experts=1, copy_experts=1, constant_experts=0, tau=0.5, **changes)


def by_hand(moe: MoEConfig, logits_BSN: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3's equations 17 to 20 with the factors of each kind of loss; choices by score alone."""
    losses = []
    for logits_SN in logits_BSN:
        p_SN = logits_SN.softmax(-1)
        if moe.gate_mode == "sigmoid":
            p_SN = logits_SN.sigmoid() / logits_SN.sigmoid().sum(-1, keepdim=True)
        loss = logits_SN.new_zeros(())
        for i in range(moe.num_experts):
            chosen = [logits_N.topk(moe.top_k).indices.tolist() for logits_N in logits_SN]
            slots = sum((token[:1] if moe.balance_loss == "gshard" else token).count(i) for token in chosen)
            eta = {
                "switch": moe.num_experts / moe.top_k,
                "gshard": moe.num_experts,
                "heterogeneous": 1.0 if i < FFN else moe.tau,
            }[moe.balance_loss]
            loss = loss + eta * (slots / len(logits_SN)) * p_SN[:, i].sum() / len(logits_SN)
        losses.append(loss)
    return torch.stack(losses).mean()


def decided(moe: MoEConfig, logits_TN: torch.Tensor) -> Routing:
    """With a bias that sends every token to the last expert first."""
    if moe.gate_mode != "sigmoid":
        return route(logits_TN, moe.top_k, moe.gate_mode)
    bias_N = torch.zeros(moe.num_experts)
    bias_N[-1] = 10
    return route_sigmoid(logits_TN, moe.top_k, bias_N)


CASES = [
    (config_of(balance_loss="switch"), "all choices"),
    (config_of(balance_loss="switch", top_k=1), "one choice"),
    (config_of(balance_loss="gshard"), "first choices"),
    (config_of(balance_loss="heterogeneous"), "some experts weigh less"),
    (config_of(balance_loss="switch", gate_mode="sigmoid", selection_bias=True), "as DeepSeek-V3; a bias is no score"),
]


@pytest.mark.parametrize("moe, reason", CASES, ids=[reason for _, reason in CASES])
def test_each_sequence_by_itself(moe, reason):
    logits_TN = 2 * torch.randn(SEQUENCES * LENGTH, moe.num_experts, generator=torch.Generator().manual_seed(1))
    wide_TN = logits_TN.double().requires_grad_()
    expected = by_hand(moe, wide_TN.view(SEQUENCES, LENGTH, -1))
    (wanted,) = torch.autograd.grad(expected, wide_TN)

    routing = decided(moe, logits_TN.requires_grad_())
    sums_B = sums_of_sequences(routing, moe, [LENGTH] * SEQUENCES)
    counts_B2N = torch.stack([torch.stack([sums.counts_N, sums.firsts_N]) for sums in sums_B])
    loss = sequence_balance_loss(sums_B, moe, counts_B2N, LENGTH)
    assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits_TN)
    assert_close(gradient, wanted, max_error=1e-5, rms_error=1e-5)

    # A rank that has the end of one sequence, all of the next and the beginning of the third; and those with the rest.
    runs = [[3, 0, 0], [3, 6, 3], [0, 0, 3]]
    parts, first = [], 0
    for tokens_B in runs:
        last = first + sum(tokens_B)
        mine = decided(moe, logits_TN[first:last])
        share = sum(tokens_B) / len(logits_TN)
        parts.append(share * sequence_balance_loss(sums_of_sequences(mine, moe, tokens_B), moe, counts_B2N, LENGTH))
        first = last
    assert_close(torch.stack(parts).sum(), expected)


def test_a_rank_without_sequences():
    moe = config_of(balance_loss="switch")
    sums_B = sums_of_sequences(route(torch.zeros(0, moe.num_experts, requires_grad=True), 2, "paper"), moe, [0])
    loss = sequence_balance_loss(sums_B, moe, torch.zeros(1, 2, moe.num_experts, dtype=torch.int64), LENGTH)
    loss.backward()
    assert loss.item() == 0


REFUSED = [
    ({"moe": {"balance_loss": "mutual_information"}}, "balance_over=sequence goes with losses of a load, not balance_"),
    ({"moe": {"gating_residual": False}, "depth": {"layers": [1]}}, "depth goes with another moe.balance_over than "),
]


@pytest.mark.parametrize("model, problem", REFUSED, ids=[problem for _, problem in REFUSED])
def test_what_has_no_sequences_to_balance_is_refused(model, problem):
    with pytest.raises(ValueError, match=problem):
        ModelConfig(**model | {"moe": model["moe"] | {"balance_over": "sequence"}})
