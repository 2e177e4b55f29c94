"""The router: the gating residual of MoE++ (arXiv 2410.07348, equation 6), norm, noise, scales and capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_close
from tiny import context_of, logits_before, training_step

from expertmesh.kernels.routing import route
from expertmesh.system.model.context import Context
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


PLAIN = {"constant_experts": 0, "copy_experts": 0, "zero_experts": 0, "gating_residual": False}


def plain(**changes: Any) -> Router:
    return router(MoEConfig(**{"ffn_experts": 6, "expert": {"hidden_size": 8}, **PLAIN, **changes}))


def training(step: int = 1, tokens: int = TOKENS) -> Context:
    return context_of(tokens, 1, training_step(tokens, step=step))


@pytest.mark.parametrize("mode", ["paper", "released", "mixtral"])
def test_normed_logits_decide_and_plain_ones_are_handed_on(mode):
    """Released MoE++: the complete logits, divided by their standard deviation (n - 1) and times the wanted one."""
    made = router(CONFIG.model_copy(update={"gate_mode": mode, "logits_norm": 2.5}))
    x_TD, previous_TN = some(TOKENS, WIDTH), some(TOKENS, CONFIG.num_experts)
    routing = made(x_TD, logits_before(previous_TN), HERE)
    complete_TN = x_TD.double() @ made.weight.double().T + previous_TN.double() @ made.gate_map.double().T
    assert_close(routing.logits_TN, complete_TN, what="what the next layer reads")
    mean_T1 = complete_TN.mean(1, keepdim=True)
    spread_T1 = ((complete_TN - mean_T1).square().sum(1, keepdim=True) / (CONFIG.num_experts - 1)).sqrt()
    normed_TN = 2.5 * complete_TN / spread_T1
    assert_close(normed_TN.std(dim=1), torch.full((TOKENS,), 2.5, dtype=torch.float64))
    want = route(normed_TN, CONFIG.top_k, mode, CONFIG.zero_experts)
    assert torch.equal(routing.experts_TK, want.experts_TK)
    assert_close(routing.weights_TK, want.weights_TK)
    assert_close(routing.scores_TN, normed_TN)


@pytest.mark.parametrize("noise", ["jitter", "gumbel", "gumbel_second", "normal"])
def test_noise_is_for_training_and_another_each_step(noise):
    made, without, x_TD = plain(noise=noise), plain(), some(200, WIDTH)
    for got, want in zip(made(x_TD, None, context_of(200)), without(x_TD, None, context_of(200)), strict=True):
        assert torch.equal(got, want)
    first, again, later = (made(x_TD, None, training(step, 200)).experts_TK for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)
    elsewhere = made(x_TD, None, training(1, 200)._replace(layer=1)).experts_TK
    assert not torch.equal(first, elsewhere), "another layer, other lots"


def test_jitter_is_a_hundredth_of_each_number():
    made, x_TD = plain(noise="jitter"), some(400, WIDTH)
    made.weight.data = torch.eye(WIDTH)  # six experts: each logit is a number of the token
    factor_TN = made(x_TD, None, training(1, 400)).logits_TN / x_TD
    assert factor_TN.min() > 0.99 - 1e-6 and factor_TN.max() < 1.01 + 1e-6
    assert factor_TN.mean().item() == pytest.approx(1, abs=5e-4)
    assert factor_TN.std().item() == pytest.approx(0.02 / 12**0.5, rel=0.05), "uniform"


def test_normal_noise_has_a_standard_deviation_of_one_over_n():
    made, x_TD = plain(noise="normal"), torch.zeros(4000, WIDTH)
    routing = made(x_TD, None, training(1, 4000))
    assert not routing.logits_TN.any(), "the logits that are handed on have none"
    noise_TN = routing.scores_TN
    assert noise_TN.std().item() == pytest.approx(1 / 6, rel=0.02)
    assert noise_TN.abs().max() > 0.4, "more than two and a half deviations, so not uniform"


def test_gumbel_draws_from_the_softmax():
    """One choice ("RSample"): an expert is drawn as often as its probability says, and weighted by it."""
    made = plain(noise="gumbel", top_k=1)
    x_TD = some(1, WIDTH).expand(6000, -1)
    routing = made(x_TD, None, training(1, 6000))
    p_N = routing.logits_TN[0].softmax(-1)
    shares_N = torch.bincount(routing.experts_TK[:, 0], minlength=6) / 6000
    assert_close(shares_N, p_N, max_error=0.03, rms_error=0.03)  # a standard deviation is 0.0065
    assert_close(p_N, (x_TD[0].double() @ made.weight.double().T).softmax(-1))
    assert torch.equal(routing.weights_TK, routing.logits_TN.softmax(-1).gather(1, routing.experts_TK))


def test_gumbel_second_draws_the_second_of_two():
    made = plain(noise="gumbel_second", gate_mode="mixtral")
    x_TD = some(1, WIDTH).expand(6000, -1)
    routing = made(x_TD, None, training(1, 6000))
    best = int(routing.logits_TN[0].argmax())
    assert (routing.experts_TK[:, 0] == best).all()
    rest_N = routing.logits_TN[0].double().index_fill(0, torch.tensor([best]), -torch.inf).softmax(-1)
    shares_N = torch.bincount(routing.experts_TK[:, 1], minlength=6) / 6000
    assert_close(shares_N, rest_N, max_error=0.04, rms_error=0.04)
    chosen_TK = routing.logits_TN.double().gather(1, routing.experts_TK)
    assert_close(routing.weights_TK, chosen_TK.softmax(-1))


def test_a_scale_adapter_of_zeros_changes_nothing():
    adapted, without, x_TD = plain(scale_adapter=True), plain(), some(TOKENS, WIDTH)
    adapted.scale_adapter.data.zero_()
    for got, want in zip(adapted(x_TD, None, HERE), without(x_TD, None, HERE), strict=True):
        assert torch.equal(got, want)


def test_a_scale_adapter_weights_and_does_not_choose():
    """AdaMoE: weight = p_i + (x W_s)_i of the chosen i, without activation or norm."""
    adapted, without = plain(scale_adapter=True, top_k=3), plain(top_k=3)
    x_TD = some(TOKENS, WIDTH).requires_grad_()
    routing, vanilla = adapted(x_TD, None, HERE), without(x_TD, None, HERE)
    assert torch.equal(routing.experts_TK, vanilla.experts_TK)
    assert torch.equal(routing.scores_TN, vanilla.scores_TN), "nor does the balance loss know of it"
    w, scales, wide_TD = (t.detach().double().requires_grad_() for t in (adapted.weight, adapted.scale_adapter, x_TD))
    want_TK = torch.stack(
        [
            torch.stack([(w @ x_D).softmax(-1)[i] + scales[i] @ x_D for i in chosen])
            for x_D, chosen in zip(wide_TD, routing.experts_TK.tolist(), strict=True)
        ]
    )
    assert_close(routing.weights_TK, want_TK)
    grad_TK = some(TOKENS, 3, seed=7)
    routing.weights_TK.backward(grad_TK)
    want_TK.backward(grad_TK.double())
    for name, got, want in (("W_s", adapted.scale_adapter, scales), ("W_g", adapted.weight, w), ("x", x_TD, wide_TD)):
        assert_close(got.grad, want.grad, what=f"gradient of {name}")
    unused = torch.bincount(routing.experts_TK.flatten(), minlength=6) == 0
    assert not adapted.scale_adapter.grad[unused].any()


def test_capacity_follows_tau():
    """All of 40 tokens like FFN expert 0 and constant expert 4: of 80 slots they serve 0.075 * 80 and 0.1 * 80."""
    config = MoEConfig(ffn_experts=8, expert={"hidden_size": 8}, gating_residual=False, capacity={"factor": 1.0})
    made, x_TD = router(config), torch.ones(40, WIDTH)
    made.weight.data.zero_()
    made.weight.data[[0, 8], 0] = torch.tensor([2.0, 1.0])
    routing = made(x_TD, None, training(1, 40))
    assert torch.equal(routing.chosen_TK, torch.tensor([0, 8]).expand(40, 2))
    assert routing.experts_TK.T.tolist() == [[0] * 6 + [12] * 34, [8] * 8 + [12] * 32]
    assert (routing.weights_TK[routing.experts_TK == 12] == 0).all()
    assert (routing.weights_TK[routing.experts_TK < 12] > 0).all(), "paper gates are not renormalised"
    assert routing.dropped_slots == 66
