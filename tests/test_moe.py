"""The MoE layer: exact identities in each gate mode, and all of it against its equations in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from tiny import context_of, logits_before
from twin import moe as moe_twin
from twin import shared_gradients, shared_weights

from expertmesh.system.model.moe import MoE
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.weights import initialise

WIDTH, TOKENS = 8, 7
FFN, CONSTANT, COPY, ZERO, OTHER_ZERO = 1, 3, 4, 5, 6  # ids of the layer below
KINDS = {"ffn_experts": 3, "expert": {"hidden_size": 5}, "constant_experts": 1, "copy_experts": 1, "zero_experts": 2}


def layer_with(config: MoEConfig, layer: int = 0) -> MoE:
    made = MoE(config, WIDTH, layer, range(config.ffn_experts), follows_moe=layer > 0)
    initialise(made, seed=2, standard_deviation=0.7)
    return made


def tokens(count: int = TOKENS) -> torch.Tensor:
    """Whole numbers, so that sums and halves are exact; the first feature is 1 and carries the router's bias."""
    x_TD = torch.randint(-8, 9, (count, WIDTH), generator=torch.Generator().manual_seed(4)).float()
    x_TD[:, 0] = 1
    return x_TD


def answer(moe: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    return moe(x_TD, None, context_of(len(x_TD)))[0]


def ffn(moe: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """The FFN expert of the rows below, alone."""
    gate_TF, up_TF = (x_TD @ moe.experts.gate_up[FFN].T).chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF @ moe.experts.down[FFN].T


# Each row: gate mode, the logit of each expert that is not far behind, and the answer to x. `p` is e / (1 + e).
p = torch.tensor([1.0, 0.0]).softmax(-1)[0]
EXACT: list[tuple[str, dict[int, float], Any, str]] = [
    ("paper", {COPY: 0.0}, lambda m, x: x, "copy alone is the identity (its probability is 1)"),
    ("paper", {ZERO: 0.0}, lambda m, x: 0 * x, "zero alone is zero"),
    ("paper", {CONSTANT: 0.0}, lambda m, x: (x + m.zero_computation.constant[0]) / 2, "W_c = 0: half x, half v"),
    ("paper", {ZERO: 1.0, COPY: 0.0}, lambda m, x: (1 - p) * x, "no renormalisation: the zero expert's share is lost"),
    ("paper", {ZERO: 0.0, FFN: 1.0}, lambda m, x: p * ffn(m, x), "zero and FFN: the FFN expert's own share"),
    ("released", {ZERO: 1.0, FFN: 0.0}, lambda m, x: ffn(m, 2 * x), "{zero, i} is E_i alone, of the doubled input"),
    ("released", {ZERO: 1.0, COPY: 0.0}, lambda m, x: 2 * x, "{zero, copy} is the doubled input"),
    (
        "released",
        {ZERO: 1.0, CONSTANT: 0.0},
        lambda m, x: (2 * x + m.zero_computation.constant[0]) / 2,
        "{zero, constant}: the constant expert sees the doubled input, v is not doubled",
    ),
    ("released", {ZERO: 1.0, OTHER_ZERO: 0.0}, lambda m, x: 0 * x, "{zero, zero} is zero and not 0/0"),
    (
        "released",
        {COPY: 1.0, FFN: 0.0},
        lambda m, x: p * 2 * x + (1 - p) * ffn(m, 2 * x),
        "the two share by their probabilities",
    ),
    ("mixtral", {ZERO: 1.0, COPY: 0.0}, lambda m, x: (1 - p) * x, "zero keeps its share; nothing is doubled"),
    ("mixtral", {ZERO: 0.0, OTHER_ZERO: 0.0}, lambda m, x: 0 * x, "{zero, zero}"),
]


@pytest.mark.parametrize("mode, logits, expected, reason", EXACT, ids=[f"{mode}: {r}" for mode, *_, r in EXACT])
def test_identities(mode, logits, expected, reason):
    moe, x_TD = layer_with(MoEConfig(**KINDS, gate_mode=mode)), tokens()
    moe.zero_computation.mix.data.zero_()
    moe.gate.weight.data.zero_()
    moe.gate.weight.data[:, 0] = -200.0  # so far behind that the probability is exactly 0
    for i, logit in logits.items():
        moe.gate.weight.data[i, 0] = logit
    y_TD, want_TD = answer(moe, x_TD), expected(moe, x_TD)
    if FFN in logits or (COPY in logits and len(logits) > 1):  # a product, or a probability, is rounded
        assert_close(y_TD, want_TD)
    else:
        assert torch.equal(y_TD, want_TD)


def test_zero_expert_gives_no_gradient_to_x():
    moe, x_TD = layer_with(MoEConfig(**KINDS, gate_mode="mixtral")), tokens().requires_grad_()
    moe.gate.weight.data.zero_()
    moe.gate.weight.data[[ZERO, OTHER_ZERO], 0] = 9.0
    answer(moe, x_TD).sum().backward()
    assert torch.equal(x_TD.grad, torch.zeros_like(x_TD))


def test_paper_gates_sum_to_at_most_one():
    _, routing = layer_with(MoEConfig(**KINDS))(tokens(), None, context_of(TOKENS))
    assert (routing.weights_TK.sum(1) <= 1).all() and (routing.weights_TK > 0).all()


@pytest.mark.parametrize("mode", ["paper", "mixtral"])
def test_without_zero_computation_experts_it_is_a_plain_top_k_moe(mode):
    config = MoEConfig(
        ffn_experts=6, expert={"hidden_size": 5}, constant_experts=0, copy_experts=0, zero_experts=0, gate_mode=mode
    )
    moe, x_TD = layer_with(config), tokens()
    y_TD = torch.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        logits_N = moe.gate.weight @ x_D
        best = logits_N.topk(2)
        gates = logits_N.softmax(-1)[best.indices] if mode == "paper" else best.values.softmax(-1)
        for g, i in zip(gates, best.indices, strict=True):
            gate_F, up_F = (moe.experts.gate_up[i] @ x_D).chunk(2)
            y_TD[t] += g * (moe.experts.down[i] @ (F.silu(gate_F) * up_F))
    assert_close(answer(moe, x_TD), y_TD)


class Case(NamedTuple):
    changes: dict[str, Any]
    tokens: int
    layer: int
    reason: str


CASES = [
    Case({}, 12, 1, "paper mode, gating residual"),
    Case({"gate_mode": "released"}, 12, 1, "released mode"),
    Case({"gate_mode": "mixtral"}, 12, 1, "mixtral mode"),
    Case({"gate_mode": "released", "top_k": 3}, 12, 1, "released mode scales by k"),
    Case({"gating_residual": False}, 12, 1, "no gating residual"),
    Case({}, 12, 0, "first layer"),
    Case({"top_k": 1}, 12, 1, "k is 1"),
    Case({"top_k": 7}, 12, 1, "every expert chosen"),
    Case({"ffn_experts": 0}, 12, 1, "no FFN experts"),
    Case({"constant_experts": 0, "copy_experts": 0, "zero_experts": 0}, 12, 1, "FFN experts only"),
    Case({}, 1, 1, "one token"),
    Case({}, 0, 1, "no tokens"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output_and_gradients_equal_the_equations(case):
    config = MoEConfig(**{**KINDS, **case.changes})
    moe, generator = layer_with(config, case.layer), torch.Generator().manual_seed(1)
    x_TD, previous_TN, grad_TD = (
        torch.randn(case.tokens, width, generator=generator) for width in (WIDTH, config.num_experts, WIDTH)
    )
    inputs = [x_TD.requires_grad_(), previous_TN.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    follows = case.layer > 0

    y_TD, routing = moe(inputs[0], logits_before(inputs[1]) if follows else None, context_of(case.tokens))
    w = shared_weights(moe)
    want_TD, want_logits_TN = moe_twin(config, w, "", wide[0], wide[1] if follows else None)
    assert_close(routing.logits_TN, want_logits_TN, what="logits")
    assert_close(y_TD, want_TD, what="output")

    (y_TD * grad_TD).sum().backward()
    (want_TD * grad_TD.double() + 0 * sum(t.sum() for t in [*w.values(), *wide])).sum().backward()
    for name, got in shared_gradients(moe).items():
        assert_close(got, w[name].grad, what=f"gradient of {name}")
    assert_close(inputs[0].grad, wide[0].grad, what="gradient of x")
    if follows and config.gating_residual:
        assert_close(inputs[1].grad, wide[1].grad, what="gradient of the logits before")
