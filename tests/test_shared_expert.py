"""The expert that every token uses: the four ways in which its answer joins that of the routed ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from tiny import context_of
from twin import Weights, shared_gradients, shared_weights

from expertmesh.system.model.moe import MoE
from expertmesh.system.model.moe_config import MoEConfig
from expertmesh.system.model.weights import initialise

WIDTH, TOKENS = 8, 6
PLAIN = {"constant_experts": 0, "copy_experts": 0, "zero_experts": 0}


def layer_of(mixing: str, kind: str = "swiglu") -> MoE:
    shared = {"kind": kind, "hidden_size": 7, "mixing": mixing}
    config = MoEConfig(ffn_experts=4, expert={"hidden_size": 5}, shared=shared, **PLAIN)
    made = MoE(config, WIDTH, 0, range(4), follows_moe=False)
    initialise(made, 2, 0.7)
    return made


def tokens(count: int = TOKENS) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(4))


def routed(w: Weights, x_D: torch.Tensor, top_k: int) -> torch.Tensor:
    g = (w["gate.weight"] @ x_D).softmax(-1)
    answers = []
    for i in g.detach().topk(top_k).indices.tolist():
        gate, up, down = (w[f"experts.{i}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        answers.append(g[i] * (down @ (F.silu(gate @ x_D) * (up @ x_D))))
    return sum(answers, x_D.new_zeros(WIDTH))


def shared(w: Weights, x_D: torch.Tensor) -> torch.Tensor:
    up_F = w["shared_expert.up_proj.weight"] @ x_D
    if "shared_expert.gate_proj.weight" in w:
        return w["shared_expert.down_proj.weight"] @ (F.silu(w["shared_expert.gate_proj.weight"] @ x_D) * up_F)
    return w["shared_expert.down_proj.weight"] @ F.gelu(up_F)


def mixed(mixing: str, w: Weights, x_D: torch.Tensor, top_k: int = 2) -> torch.Tensor:
    """The equations at the head of shared_expert.py."""
    r_D, s_D = routed(w, x_D, top_k), shared(w, x_D)
    if mixing == "sigmoid":
        return r_D + s_D / (1 + (-(w["shared_expert_gate.weight"][0] @ x_D)).exp())
    if mixing == "softmax":
        a, b = w["shared_expert_gate.weight"] @ x_D + w["shared_expert_gate.bias"]
        return (a.exp() * r_D + b.exp() * s_D) / (a.exp() + b.exp())
    return (r_D + s_D) / 2 if mixing == "mean" else r_D + s_D


@pytest.mark.parametrize("count", [TOKENS, 1, 0])
@pytest.mark.parametrize("kind", ["swiglu", "mlp"])
@pytest.mark.parametrize("mixing", ["sum", "sigmoid", "softmax", "mean"])
def test_output_and_gradients_equal_the_equations(mixing, kind, count):
    moe, x_TD, grad_TD = layer_of(mixing, kind), tokens(count).requires_grad_(), tokens(count).flip(0)
    if mixing == "softmax":
        moe.shared_expert_gate.bias.data = torch.tensor([0.5, -1.0])
    y_TD, _ = moe(x_TD, None, context_of(count))
    y_TD.backward(grad_TD)

    w, wide_TD = shared_weights(moe), x_TD.detach().double().requires_grad_()
    want_TD = torch.stack([*(mixed(mixing, w, x_D) for x_D in wide_TD), torch.zeros(WIDTH, dtype=torch.float64)])[:-1]
    ((want_TD * grad_TD.double()).sum() + 0 * sum(t.sum() for t in [*w.values(), wide_TD])).backward()
    assert_close(y_TD, want_TD)
    assert_close(x_TD.grad, wide_TD.grad, what="gradient of x")
    for name, gradient in shared_gradients(moe).items():
        # A gate's gradient is r - s times the gradient of y, summed: numbers that cancel.
        assert_close(gradient, w[name].grad, max_error=2e-4, rms_error=2e-5, what=f"gradient of {name}")


@pytest.mark.parametrize("bias, means", [((-200.0, 0.0), "the dense MLP"), ((0.0, -200.0), "the routed experts")])
def test_residual_moe_with_all_of_one(bias, means):
    """DeepSpeed's coefficients (0, 1) and (1, 0), exactly."""
    moe, x_TD = layer_of("softmax", "mlp"), tokens()
    moe.shared_expert_gate.weight.data.zero_()
    moe.shared_expert_gate.bias.data = torch.tensor(bias)
    y_TD, _ = moe(x_TD, None, context_of(TOKENS))
    if means == "the dense MLP":
        assert torch.equal(y_TD, moe.shared_expert(x_TD))
        inner_TF = F.gelu(x_TD @ moe.shared_expert.up_proj.weight.T)
        assert torch.equal(y_TD, inner_TF @ moe.shared_expert.down_proj.weight.T)
    else:
        moe.shared_expert = None
        assert torch.equal(y_TD, moe(x_TD, None, context_of(TOKENS))[0])


def test_adamoe_with_copies_of_one_expert():
    """At its start every expert is the old network f, so y = (1 + sum of weights) / 2 * f(x): not f(x) itself."""
    shared = {"hidden_size": 5, "mixing": "mean"}
    config = MoEConfig(ffn_experts=4, expert={"hidden_size": 5}, shared=shared, scale_adapter=True, top_k=1, **PLAIN)
    moe, x_TD = MoE(config, WIDTH, 0, range(4), False), tokens()
    initialise(moe, 2, 0.7)
    both = torch.cat([moe.shared_expert.gate_proj.weight, moe.shared_expert.up_proj.weight])
    moe.experts.gate_up.data = both.detach().expand(4, -1, -1).clone()
    moe.experts.down.data = moe.shared_expert.down_proj.weight.detach().expand(4, -1, -1).clone()
    y_TD, routing = moe(x_TD, None, context_of(TOKENS))
    assert_close(y_TD, (1 + routing.weights_TK) / 2 * moe.shared_expert(x_TD).double())


def test_names_are_those_of_qwen2_moe():
    names = {name for name, _ in layer_of("sigmoid").named_parameters() if "shared" in name}
    parts = [f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")]
    assert names == {"shared_expert_gate.weight", *parts}
