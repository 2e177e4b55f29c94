"""Keeps about k of a row's d numbers without sorting: a threshold from the row's mean and standard deviation.

Spark Transformer (arXiv 2506.06644), as public Gemma 3n code has it too. If the numbers of a row are normally spread,
a share k / d of them lies above the quantile 1 - k / d, so

    theta = mean(x) + std(x) * Q(1 - k / d)        Q: standard normal quantile; std biased (over d)
    y     = max(x - theta, 0)                      d = 13824, k = 1106:  Q = 1.4050,  1103 +- 21 are kept

Sorting waits for the largest numbers; mean and std are two sums, which any device does in one pass.
"""

from __future__ import annotations

from statistics import NormalDist

import torch

TINY = 1e-30  # the root of a variance of 0 has no gradient: a row of equal numbers keeps this much


def statistical_top_k(x_RF: torch.Tensor, kept: int) -> torch.Tensor:
    """max(x - theta, 0) of each row, in x's dtype; differentiable, through mean and standard deviation too.

    Args:
        x_RF: [R, F] any float dtype; mean, variance and theta are float32 (float64 for float64).
        kept: k, how many numbers of a row are kept on average, from 1 to F - 1.

    Adding a number to a row changes nothing; a positive factor on it is one on the result.

    Raises:
        ValueError: for a `kept` outside 1 to F - 1.
    """
    quantile = _quantile(kept, x_RF.shape[-1])
    x = x_RF.to(torch.promote_types(x_RF.dtype, torch.float32))
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation_R1 = centred.square().mean(dim=-1, keepdim=True).clamp(min=TINY).sqrt()
    return (centred - quantile * deviation_R1).relu().to(x_RF.dtype)


def _quantile(kept: int, width: int) -> float:
    if not 1 <= kept < width:
        raise ValueError(f"kept is {kept}; it must be from 1 to one less than the width, {width - 1}")
    return NormalDist().inv_cdf(1 - kept / width)


def statistical_top_k_ref(x_RF: torch.Tensor, kept: int) -> torch.Tensor:
    """The definition of `statistical_top_k`: each row's sums in turn, in the dtype of x."""
    rows, width = [x_RF[:0]], x_RF.shape[-1]
    for x_F in x_RF:
        mean = x_F.sum() / width
        deviation = ((x_F - mean) ** 2).sum().div(width).sqrt()
        theta = mean + deviation * _quantile(kept, width)
        rows.append(torch.where(x_F > theta, x_F - theta, torch.zeros_like(x_F))[None])
    return torch.cat(rows)
