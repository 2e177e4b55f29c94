"""The losses of one layer's router: whichever balance loss the config names, and the z-loss.

A balance loss is sum eta f P, of the load f, which has no gradient, and mean probabilities P. The more tokens f is of,
the less is asked of each sequence, and the more experts may specialise (`moe.balance_over`):

    micro_batch     f and P of a micro-batch, on all ranks
    global_batch    P of a micro-batch, f of it and of the update's before it, on all ranks: the last has the load of
                    the whole batch, the first its own alone (arXiv 2501.11873, and Megatron's global_aux_loss)
    sequence        f and P of each sequence, and the mean of their losses (arXiv 2412.19437, equations 17 to 20, and
                    Megatron's seq_aux_loss)

Selection biases, which are no losses, always move by the load of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def sums_of_sequences(routing: Routing, moe: MoEConfig, tokens_B: Sequence[int]) -> list[RouterSums]:
    """The same of each of some sequences, which have so many tokens here; they lie one after the other.

    Sigmoid scores count as they are: what else decides of them, biases and groups, is not the router's to even out
    (equation 18).
    """
    sigmoid = moe.gate_mode == "sigmoid"
    chosen_TK = routing.scores_TN.topk(moe.top_k, dim=1).indices if sigmoid else routing.chosen_TK
    runs = zip(routing.scores_TN.split(tokens_B), chosen_TK.split(tokens_B), strict=True)
    return [router_sums(scores_CN, chosen_CK, sigmoid) for scores_CN, chosen_CK in runs]


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
        load_N: [N] int64 slots that chose each expert, over the ranks that split the batch; perhaps of earlier
            micro-batches, too.
        first_N: [N] int64 tokens whose first choice it was, likewise.
        mean_over_ranks: gives [N] the mean probability of each expert over the tokens of these ranks; asked for one
            kind of loss alone.
    """
    if moe.balance_loss == "mutual_information":
        return mutual_information_loss(sums, mean_over_ranks(sums))
    return _loss_of_load(sums, moe, load_N, first_N, int(load_N.sum()) // moe.top_k)


def sequence_balance_loss(
    sums_B: Sequence[RouterSums], moe: MoEConfig, counts_B2N: torch.Tensor, length: int
) -> torch.Tensor:
    """The mean over sequences of the loss of each: a scalar, not yet weighted, whose mean over ranks is as above.

    Args:
        sums_B: of this rank's tokens of each sequence, see `sums_of_sequences`.
        counts_B2N: int64, for each the slots that chose each expert and the tokens whose first choice it was, over the
            ranks that split the sequences.
        length: tokens of a sequence on all these ranks.
    """
    tokens = max(sum(sums.tokens for sums in sums_B), 1)
    losses = [
        _loss_of_load(sums, moe, load_N, first_N, length) * (sums.tokens / tokens)
        for sums, (load_N, first_N) in zip(sums_B, counts_B2N, strict=True)
    ]
    return torch.stack(losses).sum()


def _loss_of_load(
    sums: RouterSums, moe: MoEConfig, load_N: torch.Tensor, first_N: torch.Tensor, tokens: int
) -> torch.Tensor:
    """`tokens`: how many the load is of."""
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
