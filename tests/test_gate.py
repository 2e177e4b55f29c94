"""The maps from tokens to expert logits, against their equations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import assert_close

from expertmesh.system.model.gate import LinearGate, TwoLayerGate
from expertmesh.system.model.moe_config import GateConfig

WIDTH, EXPERTS = 6, 5


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


GATES = [
    (LinearGate(WIDTH, EXPERTS), None, "one matrix"),
    (TwoLayerGate(GateConfig(hidden_size=9), WIDTH, EXPERTS), torch.tanh, "the released MoE++"),
    (TwoLayerGate(GateConfig(hidden_size=9, activation="gelu", bias=True), WIDTH, EXPERTS), gelu, "ModuleFormer"),
    (TwoLayerGate(GateConfig(hidden_size=1, bias=True), WIDTH, EXPERTS), torch.tanh, "an inner vector of one number"),
]


@pytest.mark.parametrize("gate, activation, reason", GATES, ids=[reason for *_, reason in GATES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_equals_its_equation_in_float32(gate, activation, reason, dtype, tokens):
    generator = torch.Generator().manual_seed(1)
    gate = gate.to(dtype)
    for parameter in gate.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    x_TD = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    w = {name: p.detach().double() for name, p in gate.named_parameters()}
    if activation is None:
        want_TN = x_TD.double() @ w["weight"].T
    else:
        inner_TI = x_TD.double() @ w["inner.weight"].T + w.get("inner.bias", 0)
        want_TN = activation(inner_TI) @ w["outer.weight"].T
    got_TN = gate(x_TD)
    assert got_TN.dtype == torch.float32
    assert_close(got_TN, want_TN)


@pytest.mark.parametrize("gate, activation, reason", GATES[1:], ids=[reason for *_, reason in GATES[1:]])
def test_parameters_are_counted(gate, activation, reason):
    config = GateConfig(hidden_size=gate.inner.out_features, bias=gate.inner.bias is not None)
    assert config.num_params(WIDTH, EXPERTS) == sum(p.numel() for p in gate.parameters())
