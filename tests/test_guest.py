"""A layer of ours alone: what a host may ask of it, without Megatron or DeepSpeed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from expertmesh.system.inside.guest import Chain, GuestMoE, update_selection_biases
from expertmesh.system.model.moe_config import MoEConfig

WIDTH, TOKENS, RATE = 8, 12, 1e-3
BIASED = MoEConfig(
    ffn_experts=4,
    zero_experts=0,
    copy_experts=0,
    constant_experts=0,
    expert={"hidden_size": 8},
    gate_mode="sigmoid",
    gating_residual=False,
    selection_bias=True,
    bias_update_rate=RATE,
)


def layer_of(config: MoEConfig = BIASED) -> GuestMoE:
    torch.manual_seed(0)
    return GuestMoE(config, WIDTH, range(config.ffn_experts), Chain(), 0.5)


def tokens() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def bias_of(layer: GuestMoE) -> torch.Tensor:
    return layer.moe.gate.e_score_correction_bias


def test_biases_move_towards_even_load_by_all_passes_since_the_last_update():
    layer = layer_of()
    load_N = sum(layer(x_TD)[1].load_N for x_TD in tokens().split(5))  # three micro-batches
    assert len(load_N.unique()) > 1, "an even load would move nothing"
    update_selection_biases(torch.nn.ModuleList([layer]))
    assert torch.equal(bias_of(layer), RATE * torch.sign(load_N.double().mean() - load_N).float())
    moved = bias_of(layer).clone()
    update_selection_biases(layer)
    assert torch.equal(bias_of(layer), moved), "nothing was computed in between"


def test_passes_without_gradients_move_nothing():
    layer = layer_of()
    with torch.no_grad():
        layer(tokens())
    layer.eval()(tokens())
    update_selection_biases(layer)
    assert not bias_of(layer).any()


def _bias_of_a_rank() -> torch.Tensor:
    layer = layer_of()
    alone = dist.new_subgroups(1)[0]
    layer.connect(alone, dist.group.WORLD, "cpu")
    layer(tokens().chunk(dist.get_world_size())[dist.get_rank()])
    update_selection_biases(layer)
    return bias_of(layer)


def test_biases_move_by_the_load_of_all_ranks():
    layer = layer_of()
    layer(tokens())
    update_selection_biases(layer)
    for bias_N in run_ranks(_bias_of_a_rank, 2):
        assert torch.equal(bias_N, bias_of(layer))


def test_a_part_of_the_experts_cannot_answer_before_it_knows_the_others():
    layer = GuestMoE(BIASED, WIDTH, range(2), Chain(), 0.5)
    with pytest.raises(ValueError, match="was not told yet who has the others"):
        layer(tokens())


def test_balance_over_more_than_a_host_tells_is_refused():
    with pytest.raises(ValueError, match="moe.balance_over=sequence works in our own trainer only"):
        layer_of(BIASED.model_copy(update={"balance_over": "sequence"}))
