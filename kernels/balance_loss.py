"""The loss that spreads tokens over experts, and keeps the FFN experts' share as large as one wants it.

MoE++ (arXiv 2410.07348, equations 7 to 9) weights the usual balance loss per expert: 1 for an FFN expert, tau for a
zero-computation one. At the minimum the router's probabilities are proportional to 1/eta, so with tau < 1 an FFN expert
gets tau times the tokens of a zero-computation expert: the smaller tau, the cheaper and weaker the model.

    8 FFN + 4 others, tau = 0.75, K = 2:    P = 0.075 for FFN, 0.1 for the others;    loss = K / (8 + 4/tau) = 0.15

Unlike the Switch loss there is no factor N in front.

Legend: N experts of every kind, K experts a token.
"""

from __future__ import annotations

import torch

from expertmesh.kernels.router_sums import RouterSums


def balance_loss(sums: RouterSums, counts_N: torch.Tensor, tokens: int, eta_N: torch.Tensor) -> torch.Tensor:
    """sum_i eta_i f_i P_i of one layer, with f_i = counts_i / tokens and P_i the mean probability (equation 7).

    Args:
        sums: of this rank's tokens; their probabilities are the only input that gets a gradient.
        counts_N: [N] int64 slots that chose each expert, in this rank's tokens or in those of all ranks.
        tokens: the number of tokens that `counts_N` was taken over.
        eta_N: [N] weight of each expert, see `heterogeneous_eta`.

    Returns:
        Scalar in the sums' dtype; 0, with a gradient of 0, when there are no tokens. With counts over all
        ranks and equally many tokens on each, the mean of this loss over the ranks is the loss of the whole batch.
    """
    means_N = sums.means_N
    fractions_N = counts_N.detach().to(means_N.dtype) / max(tokens, 1)
    return (eta_N.to(means_N.dtype) * fractions_N * means_N).sum()


def heterogeneous_eta(ffn_experts: int, zero_computation_experts: int, tau: float) -> torch.Tensor:
    """[N] float32: 1 for each FFN expert, then `tau` for each zero-computation expert (equation 7).

    Args:
        ffn_experts: number of FFN experts, whose ids come first.
        zero_computation_experts: number of constant, copy and zero experts together.
        tau: the paper tries 0.1 to 1 and takes 0.75; 1 treats all experts alike.

    Raises:
        ValueError: if tau is not positive: a zero-computation expert would then be free to take every token.
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; it must be above 0")
    return torch.cat([torch.ones(ffn_experts), torch.full((zero_computation_experts,), float(tau))])
