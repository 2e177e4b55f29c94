"""The loss that keeps router logits small, where float arithmetic tells them apart and a softmax does not saturate.

ST-MoE (arXiv 2202.08906, equation 5): the mean over tokens of the squared log-sum-exp of the logits.
"""

from __future__ import annotations

import torch


def z_loss(logits_TN: torch.Tensor) -> torch.Tensor:
    """Scalar mean of logsumexp(logits_t)^2 over T tokens, in float32; 0, with a gradient of 0, where there are none."""
    return logits_TN.float().logsumexp(dim=-1).square().sum() / max(logits_TN.shape[0], 1)


def z_loss_ref(logits_TN: torch.Tensor) -> torch.Tensor:
    """Token by token, from the equation."""
    terms = [torch.log(torch.exp(logits_N.float()).sum()) ** 2 for logits_N in logits_TN]
    return torch.stack(terms).mean() if terms else logits_TN.sum()
