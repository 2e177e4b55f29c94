"""The router's logits: a linear map plus the gating residual of MoE++ (arXiv 2410.07348, equation 6)."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from tiny import context_of, logits_before

from expertmesh.kernels.routing import route
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.router import Router

CONFIG = MoEConfig(ffn_experts=4, expert={"hidden_size": 8})
WIDTH, TOKENS = 6, 9
HERE = context_of(TOKENS)


def router(config: MoEConfig = CONFIG, follows_moe: bool = True, seed: int = 0) -> Router:
    made, generator = Router(config, WIDTH, follows_moe), torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


def some(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_gate_map_of_zeros_is_a_vanilla_router():
    made, x_TD = router(), some(TOKENS, WIDTH)
    made.gate_map.data.zero_()
    routing = made(x_TD, logits_before(some(TOKENS, CONFIG.num_experts)), HERE)
    vanilla = route(x_TD @ made.weight.T, CONFIG.top_k, CONFIG.gate_mode, CONFIG.zero_experts)
    for got, want in zip(routing, vanilla, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("residual, follows_moe", [(True, False), (False, True)], ids=["first layer", "switched off"])
def test_without_a_gate_map_the_layer_before_does_not_matter(residual, follows_moe):
    made = router(CONFIG.model_copy(update={"gating_residual": residual}), follows_moe)
    assert made.gate_map is None and [name for name, _ in made.named_parameters()] == ["weight"]
    x_TD = some(TOKENS, WIDTH)
    before = logits_before(some(TOKENS, CONFIG.num_experts))
    assert torch.equal(made(x_TD, before, HERE).logits_TN, made(x_TD, None, HERE).logits_TN)


def test_the_residual_reads_and_hands_on_complete_logits():
    first, second, third = router(follows_moe=False), router(seed=1), router(seed=2)
    x1, x2, x3 = (some(TOKENS, WIDTH, seed=s) for s in (1, 2, 3))
    one = first(x1, None, HERE)
    two = second(x2, one, HERE)
    z3 = third(x3, two, HERE).logits_TN
    w1, w2, w3 = (r.weight.detach().double() for r in (first, second, third))
    g2, g3 = (r.gate_map.detach().double() for r in (second, third))
    assert_close(z3, x3.double() @ w3.T + (x2.double() @ w2.T + x1.double() @ w1.T @ g2.T) @ g3.T)


def test_the_residual_carries_gradients_back():
    first, second = router(follows_moe=False), router(seed=1)
    x_TD = some(TOKENS, WIDTH)
    second(x_TD, first(x_TD, None, HERE), HERE).logits_TN.sum().backward()
    assert_close(first.weight.grad, second.gate_map.detach().sum(0)[:, None] * x_TD.sum(0))


def test_bfloat16_models_route_in_float32():
    made, x_TD = router().to(torch.bfloat16), some(TOKENS, WIDTH).to(torch.bfloat16)
    previous_TN = some(TOKENS, CONFIG.num_experts)
    routing = made(x_TD, logits_before(previous_TN), HERE)
    assert {t.dtype for t in routing} == {torch.int64, torch.float32}
    expected = x_TD.double() @ made.weight.double().T + previous_TN.double() @ made.gate_map.double().T
    assert_close(routing.logits_TN, expected)
