"""One network used wide and deep: against its equations, while training and serving, and what a token is spared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from tiny import context_of, training_step
from torch import nn
from twin import rms_norm, shared_gradients, shared_weights

from expertmesh.system.model.context import Context
from expertmesh.system.model.experts_config import VersatileConfig
from expertmesh.system.model.versatile import VersatileFFN
from expertmesh.system.model.weights import initialise

WIDTH = 6


class Half(nn.Module):
    """The network and the norm of its block."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.config = VersatileConfig(**{"kind": "versatile", "hidden_size": 12, "slices": 4, "loops": 3, **changes})
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.ffn = VersatileFFN(self.config, WIDTH)
        initialise(self, 3, 0.5)

    def forward(self, x_TD: torch.Tensor, context: Context) -> torch.Tensor:
        return self.ffn(x_TD, self.norm, context)


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(4))


def force_loops(half: Half, loops: int, x_TD: torch.Tensor) -> None:
    """Every token chooses `loops`, far ahead of the rest; their first number is 1 from now on."""
    x_TD[:, 0] = 1
    half.ffn.loop_gate.weight.data.zero_()
    half.ffn.loop_gate.weight.data[loops - 1, 0] = 500.0


def twin(half: Half, w: dict[str, torch.Tensor], x_TD: torch.Tensor, context: Context) -> torch.Tensor:
    """One token at a time, every loop and every slice by itself."""
    config = half.config
    size = config.hidden_size // config.slices
    lots_TL, temperature = None, 1.0
    if context.training is not None:
        lots_TL = context.training.lots(0, "loops", config.loops, x_TD.device).double()
        temperature = max(5.0 * 0.99984 ** (context.training.step - 1), 0.1)

    def ffn(x_D: torch.Tensor, units: slice = slice(None)) -> torch.Tensor:
        n_D = rms_norm(x_D, w["norm.weight"], 1e-5)
        gate_F, up_F = (w[f"ffn.{part}_proj.weight"][units] @ n_D for part in ("gate", "up"))
        return w["ffn.down_proj.weight"][:, units] @ (F.silu(gate_F) * up_F)

    answers = [x_TD[:0]]
    for t, x_D in enumerate(x_TD):
        z_W = w["ffn.slice_gate.weight"] @ x_D
        best = z_W.detach().topk(config.top_k).indices.tolist()
        weights = z_W[best].softmax(0)
        width_D = sum(g * (x_D + ffn(x_D, slice(i * size, (i + 1) * size))) for g, i in zip(weights, best, strict=True))
        p_L = w["ffn.loop_gate.weight"] @ x_D
        if lots_TL is None:
            chosen_L = F.one_hot(p_L.argmax(), config.loops).double()
        else:
            soft_L = ((p_L - (-lots_TL[t].log()).log()) / temperature).softmax(0)
            chosen_L = F.one_hot(soft_L.argmax(), config.loops) + soft_L - soft_L.detach()
        depth_D, loop_D, expected = torch.zeros_like(x_D), x_D, x_D.new_zeros(())
        for i, share in enumerate(chosen_L, start=1):
            loop_D = loop_D + ffn(loop_D)
            depth_D, expected = depth_D + share * loop_D, expected + i * share
        a = (config.loops - expected) / config.loops
        answers.append(((1 - a) * depth_D + a * width_D)[None])
    return torch.cat(answers)


CASES = [
    ({}, 9, None, "serving"),
    ({}, 9, 1, "the first step of training"),
    ({}, 9, 5000, "a late step, at a lower temperature"),
    ({"loops": 1}, 9, 1, "one loop"),
    ({"slices": 1, "top_k": 1}, 9, None, "one slice"),
    ({"top_k": 4}, 9, 1, "all slices chosen"),
    ({"top_k": 1}, 1, None, "one token, one slice of it chosen"),
    ({}, 0, None, "no tokens"),
    ({}, 1, 1, "one token in training"),
]


@pytest.mark.parametrize("changes, count, step, reason", CASES, ids=[reason for *_, reason in CASES])
def test_equals_the_equations(changes, count, step, reason):
    half, x_TD = Half(**changes), tokens(count).requires_grad_()
    context = context_of(count, training=step and training_step(count, step=step))
    y_TD, grad_TD = half(x_TD, context), torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(5))
    (y_TD * grad_TD).sum().backward()

    w, wide_TD = shared_weights(half), x_TD.detach().double().requires_grad_()
    expected_TD = twin(half, w, wide_TD, context)
    ((expected_TD * grad_TD.double()).sum() + 0 * sum(t.sum() for t in [*w.values(), wide_TD])).backward()
    assert_close(y_TD, expected_TD)
    assert_close(x_TD.grad, wide_TD.grad, what="gradient of x")
    for name, gradient in shared_gradients(half).items():
        assert_close(gradient, w[name].grad, what=f"gradient of {name}")


@pytest.mark.parametrize("training", [False, True])
def test_the_last_loop_is_the_network_applied_that_many_times(training):
    half, x_TD = Half(loops=4), tokens(5)
    force_loops(half, 4, x_TD)
    y_TD = x_TD
    for _ in range(4):
        y_TD = y_TD + half.ffn.down_proj(half.ffn.hidden(half.norm(y_TD)))
    assert_close(half(x_TD, context_of(5, training=training_step(5) if training else None)), y_TD)


def test_all_slices_together_are_the_network():
    half, x_TD = Half(top_k=4), tokens(5)
    half.ffn.slice_gate.weight.data.zero_()  # each has a weight of 1/4
    force_loops(half, 1, x_TD)
    ffn_TD = half.ffn.down_proj(half.ffn.hidden(half.norm(x_TD)))
    depth_TD, width_TD = x_TD + ffn_TD, x_TD + ffn_TD / 4
    assert_close(half(x_TD, context_of(5)), depth_TD / 3 + 2 * width_TD / 3)


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_serving_stops_at_the_last_loop_that_a_token_needs(needed):
    half, x_TD = Half(), tokens(5)
    force_loops(half, needed, x_TD)
    calls: list[int] = []
    half.ffn.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    half(x_TD, context_of(5))
    assert len(calls) == needed
    half(x_TD, context_of(5, training=training_step(5)))
    assert len(calls) == needed + 3, "training computes every loop, for the gradient"


def test_new_parameters_are_the_two_small_maps():
    half = Half()
    counted = sum(p.numel() for p in half.ffn.parameters())
    assert counted == half.config.num_params(WIDTH) == 3 * 12 * WIDTH + (4 + 3) * WIDTH


def test_the_temperature_falls_to_its_last_value():
    config = Half().config
    assert config.temperature(1) == 5.0 and config.temperature(2) == 5.0 * 0.99984
    assert config.temperature(24_449) > 0.1 == config.temperature(24_450) == config.temperature(10**6)


def test_noise_differs_by_step_and_is_absent_in_serving():
    half, x_TD = Half(loops=8), tokens(20)
    half.ffn.loop_gate.weight.data.zero_()
    first_TD, again_TD, other_TD = (half(x_TD, context_of(20, training=training_step(20, step=s))) for s in (1, 1, 2))
    assert torch.equal(first_TD, again_TD) and not torch.equal(first_TD, other_TD)
    assert torch.equal(half(x_TD, context_of(20)), half(x_TD, context_of(20)))
