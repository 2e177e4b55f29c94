"""The losses of one layer's router: whichever balance loss the config names, and the z-loss."""

from __future__ import annotations

from collections.abc import Callable

import torch

from expertmesh.kernels.balance_loss import balance_loss, heterogeneous_eta
from expertmesh.kernels.mutual_information import mutual_information_loss
from expertmesh.kernels.router_sums import RouterSums, router_sums
from expertmesh.kernels.routing import Routing
from expertmesh.system.model.moe_config import MoEConfig


def sums_of(routing: Routing, moe: MoEConfig) -> RouterSums:
    """All that the losses need of one layer's router: one pass over its logits, but for those normed or made noisy.

    Balance losses are of the logits that decided; the z-loss is of the plain ones.
    """
    sums = router_sums(routing.scores_TN, routing.chosen_TK, moe.gate_mode == "sigmoid")
    if routing.logits_TN is routing.scores_TN:
        return sums
    return sums._replace(z=router_sums(routing.logits_TN, routing.chosen_TK).z)


def router_balance_loss(
    sums: RouterSums,
    moe: MoEConfig,
    load_N: torch.Tensor,
    first_N: torch.Tensor,
    mean_over_ranks: Callable[[RouterSums], torch.Tensor],
) -> torch.Tensor:
    """A scalar, not yet weighted. Its mean over ranks with equally many tokens is the loss of the whole batch.

    Args:
        sums: of this rank's tokens.
        load_N: [N] int64 slots that chose each expert, over the ranks that split the batch.
        first_N: [N] int64 tokens whose first choice it was, likewise.
        mean_over_ranks: gives [N] the mean probability of each expert over the tokens of these ranks; asked for one
            kind of loss alone.
    """
    if moe.balance_loss == "mutual_information":
        return mutual_information_loss(sums, mean_over_ranks(sums))
    tokens = int(load_N.sum()) // moe.top_k
    experts = moe.num_experts
    if moe.balance_loss == "heterogeneous":
        eta_N = heterogeneous_eta(moe.ffn_experts, moe.zero_computation_experts, moe.tau)
        return balance_loss(sums, load_N, tokens, eta_N.to(load_N.device))
    # Both are 1 where all experts are used alike. Switch counts all choices (arXiv 2101.03961, equation 4), GShard
    # and DeepSpeed the first ones (arXiv 2006.16668, algorithm 1).
    even = sums.probabilities_N.new_full((experts,), float(experts))
    if moe.balance_loss == "switch":
        return balance_loss(sums, load_N, tokens, even / moe.top_k)
    return balance_loss(sums, first_N, tokens, even)
