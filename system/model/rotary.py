"""Rotary positions: queries and keys turned by their place, so that their product knows how far apart they are."""

from __future__ import annotations

import torch


def rotate(x_THd: torch.Tensor, positions_T: torch.Tensor, theta: float | None) -> torch.Tensor:
    """Turn each pair (i, i + d/2) of a head by position * theta^(-2i/d) (RoFormer, arXiv 2104.09864, section 3.4.2).

    `theta` None turns nothing: a model without positions.
    """
    if theta is None:
        return x_THd
    half = x_THd.shape[-1] // 2
    exponents = torch.arange(half, device=x_THd.device, dtype=torch.float32) / half
    angles_Th = positions_T[:, None].float() * theta**-exponents
    cos_T1h, sin_T1h = angles_Th.cos()[:, None], angles_Th.sin()[:, None]
    first_THh, second_THh = x_THd.float().chunk(2, dim=-1)
    turned = (first_THh * cos_T1h - second_THh * sin_T1h, second_THh * cos_T1h + first_THh * sin_T1h)
    return torch.cat(turned, dim=-1).type_as(x_THd)


def rotate_interleaved(x_THd: torch.Tensor, positions_T: torch.Tensor, theta: float) -> torch.Tensor:
    """`rotate` for weights that keep the two of a pair side by side; the result has them half a head apart."""
    return rotate(x_THd.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), positions_T, theta)
