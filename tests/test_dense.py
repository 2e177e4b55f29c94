"""Networks without routing, in the place of a MoE layer: against their equations, and a nested one at its widths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from tiny import context_of
from torch import nn
from twin import shared_gradients, shared_weights

from expertmesh.system.model.dense import DenseMLP, DenseSwiGLU
from expertmesh.system.model.experts_config import MLPConfig, SwiGLUConfig
from expertmesh.system.model.weights import initialise

WIDTH, HIDDEN = 6, 8
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def swiglu(hidden_size: int = HIDDEN, nested: tuple[float, ...] = (0.25, 0.5, 1)) -> DenseSwiGLU:
    dense = DenseSwiGLU(SwiGLUConfig(hidden_size=hidden_size, nested=nested), WIDTH)
    initialise(dense, 3, 0.5)
    return dense


def check(dense: nn.Module, tokens: int, width: float, units: int) -> None:
    """Output and every gradient, against the network of the first `units` hidden units in float64."""
    generator = torch.Generator().manual_seed(tokens)
    x_TD, grad_TD = (torch.randn(tokens, WIDTH, generator=generator) for _ in range(2))
    y_TD, routing = dense(x_TD.requires_grad_(), None, context_of(tokens, width=width))
    assert routing is None, "it decides nothing"
    (y_TD * grad_TD).sum().backward()

    w, wide_TD = shared_weights(dense), x_TD.detach().double().requires_grad_()
    up_TF = wide_TD @ w["up_proj.weight"][:units].T
    if isinstance(dense, DenseSwiGLU):
        inner_TF = F.silu(wide_TD @ w["gate_proj.weight"][:units].T) * up_TF
    else:
        inner_TF = ACTIVATIONS[dense.activation](up_TF)
    expected_TD = inner_TF @ w["down_proj.weight"][:, :units].T
    (expected_TD * grad_TD.double()).sum().backward()
    assert_close(y_TD, expected_TD)
    assert_close(x_TD.grad, wide_TD.grad, what="gradient of x")
    for name, gradient in shared_gradients(dense).items():
        assert_close(gradient, w[name].grad, what=f"gradient of {name}")


TOKENS = pytest.mark.parametrize("tokens", [7, 1, 0], ids=["some tokens", "one token", "no tokens"])


@TOKENS
@pytest.mark.parametrize("share, units", [(0.25, 2), (0.5, 4), (1.0, 8)])
def test_swiglu_equals_the_equation(tokens, share, units):
    check(swiglu(), tokens, share, units)


@TOKENS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_equals_the_equation(tokens, activation):
    dense = DenseMLP(MLPConfig(kind="mlp", hidden_size=HIDDEN, activation=activation), WIDTH)
    initialise(dense, 3, 0.5)
    check(dense, tokens, 1.0, HIDDEN)


def test_nested_at_full_width_is_plain_bit_for_bit():
    nested, plain, x_TD = swiglu(), swiglu(nested=()), torch.randn(9, WIDTH)
    expected_TD = plain.down_proj(F.silu(plain.gate_proj(x_TD)) * plain.up_proj(x_TD))
    for dense in (nested, plain):
        assert torch.equal(dense(x_TD, None, context_of(9))[0], expected_TD)


def test_nested_is_the_smaller_network_of_its_first_units():
    nested, small, x_TD = swiglu(), swiglu(hidden_size=4, nested=()), torch.randn(9, WIDTH)
    for part in ("gate_proj", "up_proj"):
        small.get_parameter(f"{part}.weight").data.copy_(nested.get_parameter(f"{part}.weight")[:4])
    small.down_proj.weight.data.copy_(nested.down_proj.weight[:, :4])
    found_TD, _ = nested(x_TD, None, context_of(9, width=0.5))
    assert torch.equal(found_TD, small(x_TD, None, context_of(9))[0])


def test_units_beyond_the_width_get_a_gradient_of_exactly_zero():
    nested = swiglu()
    nested(torch.randn(9, WIDTH), None, context_of(9, width=0.5))[0].sum().backward()
    for grad in (nested.gate_proj.weight.grad, nested.up_proj.weight.grad, nested.down_proj.weight.grad.T):
        assert not grad[4:].any() and (grad[:4].abs().sum(dim=1) > 0).all()


def test_gradient_of_summed_losses_is_the_sum_of_gradients():
    x_TD = torch.randn(9, WIDTH)

    def losses(dense: DenseSwiGLU) -> list[torch.Tensor]:
        return [dense(x_TD, None, context_of(9, width=share))[0].square().sum() for share in (0.25, 0.5, 1.0)]

    together, apart = swiglu(), swiglu()
    sum(losses(together)).backward()
    for loss in losses(apart):
        loss.backward()
    for name, parameter in together.named_parameters():
        assert_close(parameter.grad, apart.get_parameter(name).grad, what=name)
