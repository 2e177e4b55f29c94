"""The figures of one layer, by hand."""

from __future__ import annotations

import pytest
import torch

from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.train.layer_summary import summarise

MOE = MoEConfig(ffn_experts=3, constant_experts=2, copy_experts=1, zero_experts=1, top_k=2)


def test_by_hand():
    """20 tokens, so 40 slots: 24 of FFN experts, 6 constant, 8 copy, 2 zero; 4 of them dropped."""
    summary = summarise(5, MOE, torch.tensor([16, 6, 2, 4, 2, 8, 2]), 4, 1.5, 0.2, 0.3)
    assert summary._asdict() == pytest.approx(
        {
            "layer": 5,
            "load_max_over_mean": 2.0,
            "ffn_experts_per_token": 1.2,
            "constant_share": 0.15,
            "copy_share": 0.2,
            "zero_share": 0.05,
            "dropped_share": 0.1,
            "router_entropy": 1.5,
            "balance_loss": 0.2,
            "z_loss": 0.3,
        }
    )


def test_no_tokens_and_no_ffn_experts():
    nothing = summarise(0, MOE, torch.zeros(7, dtype=torch.int64), 0, 0.0, 0.0, 0.0)
    assert (nothing.load_max_over_mean, nothing.ffn_experts_per_token, nothing.dropped_share) == (1.0, 0.0, 0.0)
    free = MoEConfig(ffn_experts=0)
    summary = summarise(0, free, torch.tensor([1, 1, 1, 1]), 0, 0.0, 0.0, 0.0)
    assert (summary.load_max_over_mean, summary.zero_share, summary.constant_share) == (1.0, 0.25, 0.5)
