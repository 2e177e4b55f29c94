"""A balance loss that wants each token sure of its expert, and all experts used alike.

ModuleFormer (arXiv 2306.04640; released code): the negative mutual information of tokens and experts,

    L = sum_e m_e log m_e - mean_t sum_e p_te log p_te        m = mean_t p_t

    p uniform: 0        tokens sure, experts even: -log N (the least)        all tokens sure of one expert: 0

Legend: N experts.
"""

from __future__ import annotations

import torch

from expertmesh.kernels.router_sums import RouterSums

EPSILON = 1e-8  # of the released code, where an expert has no probability at all


def mutual_information_loss(sums: RouterSums, means_N: torch.Tensor) -> torch.Tensor:
    """The loss of one layer: a scalar in the sums' dtype, 0 where there are no tokens.

    Args:
        sums: of this rank's tokens; their probabilities and information are the only inputs that get a gradient.
        means_N: [N] mean probability of each expert, over this rank's tokens or those of all ranks.

    With the means of all ranks and equally many tokens on each, the mean of this loss over ranks is that of the whole
    batch, and so is its gradient: what a gradient through the logarithm of m would add is the same for all experts of a
    token, which a softmax takes no notice of.
    """
    return (sums.means_N * (means_N.detach() + EPSILON).log()).sum() + sums.entropy


def mutual_information_loss_ref(probabilities_TN: torch.Tensor) -> torch.Tensor:
    """The definition, of [T, N] probabilities of all tokens; the gradient goes through both terms."""
    means_N = probabilities_TN.mean(dim=0)
    given = torch.stack([(p_N * p_N.log()).sum() for p_N in probabilities_TN]).mean()
    return (means_N * means_N.log()).sum() - given
