"""Experts that scale and shift what all of them share: against the equations, alone and in the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expert_twin import COUNTS, assert_equals_twin
from numerics import assert_close
from tiny import context_of
from twin import Weights, gates, shared_gradients, shared_weights
from twin import expert as zero_computation_twin

from expertmesh.system.model.modulated_experts import ModulatedExperts
from expertmesh.system.model.moe import MoE
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.weights import initialise

WIDTH = 6
PLAIN = {"zero_experts": 0, "copy_experts": 0, "constant_experts": 0, "gate_mode": "mixtral"}


def fme(w: Weights, prefix: str, h_D: torch.Tensor) -> torch.Tensor:
    scale_D, shift_D = (w[f"{prefix}{part}.weight"] @ h_D + w[f"{prefix}{part}.bias"] for part in ("scale", "shift"))
    return scale_D * h_D + shift_D


def layer(**changes: Any) -> MoE:
    config = MoEConfig(
        **{"ffn_experts": 4, "expert": {"kind": "modulated", "adaptor_size": 5}, "gating_residual": False, **changes}
    )
    moe = MoE(config, WIDTH, 0, range(4), follows_moe=False)
    initialise(moe, 2, 0.7)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in moe.named_parameters():
        if "bias" in name:  # they start at 0, where a mistake would not show
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return moe


@pytest.mark.parametrize("counts, why", COUNTS, ids=[why for _, why in COUNTS])
def test_experts_equal_the_equation(counts, why):
    experts = ModulatedExperts(WIDTH, range(4))
    initialise(experts, 3, 0.5)
    experts.bias.data.copy_(torch.randn(4, 2 * WIDTH, generator=torch.Generator().manual_seed(1)))
    assert_equals_twin(experts, WIDTH, lambda w, h_D: fme(w, "", h_D), counts)


CASES = [
    (PLAIN, 7, "weights that sum to 1"),
    ({}, 7, "among zero-computation experts: a copy is one of the features"),
    ({"gate_mode": "released"}, 7, "all read the doubled input"),
    ({**PLAIN, "top_k": 1}, 1, "one token, one expert"),
    (PLAIN, 0, "no tokens"),
]


@pytest.mark.parametrize("changes, tokens, reason", CASES, ids=[reason for *_, reason in CASES])
def test_the_layer_equals_the_equations(changes, tokens, reason):
    moe = layer(**changes)
    config, generator = moe.gate.config, torch.Generator().manual_seed(4)
    x_TD, grad_TD = (torch.randn(tokens, WIDTH, generator=generator) for _ in range(2))
    y_TD, _ = moe(x_TD.requires_grad_(), None, context_of(tokens))
    (y_TD * grad_TD).sum().backward()

    w, wide_TD = shared_weights(moe), x_TD.detach().double().requires_grad_()
    answers = [wide_TD.new_zeros(0, WIDTH)]
    for x_D in wide_TD:
        logits_N = w["gate.weight"] @ x_D
        x_D = x_D * (2 if config.gate_mode == "released" else 1)
        h_D = F.gelu(w["frame.gate_proj.weight"] @ x_D) * (w["frame.up_proj.weight"] @ x_D)
        inside_D = torch.zeros_like(x_D)
        for i, g in gates(config, logits_N):
            free = i >= config.ffn_experts
            answer_D = zero_computation_twin(config, w, "", i, h_D) if free else fme(w, f"experts.{i}.", h_D)
            inside_D = inside_D + g * answer_D
        inner_A = F.gelu(w["frame.adaptor_in.weight"] @ inside_D + w["frame.adaptor_in.bias"])
        answers.append((w["frame.adaptor_out.weight"] @ inner_A + w["frame.adaptor_out.bias"])[None])
    expected_TD = torch.cat(answers)
    ((expected_TD * grad_TD.double()).sum() + 0 * sum(t.sum() for t in [*w.values(), wide_TD])).backward()
    assert_close(y_TD, expected_TD)
    assert_close(x_TD.grad, wide_TD.grad, what="gradient of x")
    for name, gradient in shared_gradients(moe).items():
        assert_close(gradient, w[name].grad, what=f"gradient of {name}")


def test_with_scale_1_and_shift_0_the_router_has_no_say():
    moe, x_TD = layer(**PLAIN), torch.randn(9, WIDTH)
    moe.experts.weight.data.zero_()
    moe.experts.bias.data.copy_(torch.cat([torch.ones(WIDTH), torch.zeros(WIDTH)]).expand(4, -1))
    y_TD, routing = moe(x_TD, None, context_of(9))
    moe.gate.weight.data.neg_()
    other_TD, other = moe(x_TD, None, context_of(9))
    assert not torch.equal(routing.experts_TK, other.experts_TK)
    assert_close(other_TD, y_TD)
    assert_close(y_TD, moe.frame.leave(moe.frame.enter(x_TD)))


def test_parameters_are_counted():
    moe = layer()
    assert sum(p.numel() for p in moe.parameters()) == moe.gate.config.num_params(WIDTH, 4)
