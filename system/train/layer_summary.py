"""What one layer's router did in a step, in the figures that people debug with; cheap enough to be always on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from expertmesh.system.model.moe_config import MoEConfig


class LayerSummary(NamedTuple):
    """Of one layer that has experts, over all ranks. Shares are of the slots: top_k for each token."""

    layer: int
    load_max_over_mean: float  # of FFN experts: 1 where all have as much to do
    ffn_experts_per_token: float
    constant_share: float
    copy_share: float
    zero_share: float
    dropped_share: float
    router_entropy: float  # nats; log of the number of experts where the router cannot tell them apart
    balance_loss: float  # not weighted
    z_loss: float


def summarise(
    layer: int,
    moe: MoEConfig,
    load_N: torch.Tensor,
    dropped: int,
    router_entropy: float,
    balance_loss: float,
    z_loss: float,
) -> LayerSummary:
    """load_N: int64 slots that chose each expert; of them `dropped` were more than a full expert serves."""
    slots = max(int(load_N.sum()), 1)
    kinds = [moe.ffn_experts, moe.constant_experts, moe.copy_experts, moe.zero_experts]
    ffn_E, *others = load_N.split(kinds)
    constant, copy, zero = (int(part.sum()) / slots for part in others)
    on_ffn = int(ffn_E.sum())
    return LayerSummary(
        layer=layer,
        load_max_over_mean=int(ffn_E.max()) * moe.ffn_experts / on_ffn if on_ffn else 1.0,
        ffn_experts_per_token=moe.top_k * on_ffn / slots,
        constant_share=constant,
        copy_share=copy,
        zero_share=zero,
        dropped_share=dropped / slots,
        router_entropy=router_entropy,
        balance_loss=balance_loss,
        z_loss=z_loss,
    )


def side_by_side(loads_N: Sequence[torch.Tensor], moe: MoEConfig) -> torch.Tensor:
    """[L, N] counts of the layers with experts, each expert in the column of its name in `moe.expert_names`.

    Layers of a pyramid that have fewer FFN experts show 0 for those they lack.
    """
    rows_LN = torch.zeros(len(loads_N), moe.num_experts, dtype=torch.int64)
    for row_N, load_N in zip(rows_LN, loads_N, strict=True):
        ffn = len(load_N) - moe.zero_computation_experts
        row_N[:ffn], row_N[moe.ffn_experts :] = load_N[:ffn], load_N[ffn:]
    return rows_LN
