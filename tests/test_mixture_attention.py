"""Mixtures of attentions against their equations in float64, against plain attention, and BAM's exact identities."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from numerics import assert_close
from tiny import context_of
from torch import nn
from torch.nn import functional
from twin import Weights, shared_gradients, shared_weights

from expertmesh.system.model.attention import Attention
from expertmesh.system.model.attention_config import AttentionConfig, MixtureAttentionConfig
from expertmesh.system.model.block import build_blocks
from expertmesh.system.model.config import ModelConfig
from expertmesh.system.model.mixture_attention import MixtureAttention
from expertmesh.system.model.weights import initialise

WIDTH = 12
MODULEFORMER = {
    "experts": 5,
    "top_k": 2,
    "heads": 2,
    "kv_heads": 2,
    "kv_bias": True,
    "rope_theta": None,
    "weighting": "stick_breaking",
    "gate": {"hidden_size": 7, "activation": "gelu", "bias": True},
}
BAM = {"experts": 3, "top_k": 3, "heads": 4, "kv_heads": 2, "rope_theta": 100.0}


def config_of(**keys: Any) -> MixtureAttentionConfig:
    return MixtureAttentionConfig(kind="mixture", head_dim=4, **keys)


def made(config: MixtureAttentionConfig) -> MixtureAttention:
    mixture = MixtureAttention(config, WIDTH)
    initialise(mixture, seed=3, standard_deviation=0.5)
    for name, parameter in mixture.named_parameters():  # biases that show
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return mixture


def some(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def twin(config: MixtureAttentionConfig, w: Weights, x_SD: torch.Tensor) -> torch.Tensor:
    """One sequence from its first token: one token, one of its choices and one head at a time."""
    d, group = config.head_dim, config.heads // config.kv_heads

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def turned(vector_d: torch.Tensor, position: int) -> torch.Tensor:
        if config.rope_theta is None:
            return vector_d
        pairs = torch.complex(vector_d[: d // 2], vector_d[d // 2 :])
        angles = position * config.rope_theta ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag])

    def shares(scores: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of what each position up to the query's own gets."""
        if config.weighting == "softmax":
            return list(torch.stack(scores).softmax(-1))
        sizes, stick = list[torch.Tensor](), scores[0].new_ones(())
        for score in reversed(scores):
            sizes.append(stick * score.sigmoid())
            stick = stick * (1 - score.sigmoid())
        return sizes[::-1]

    rows = []
    for s, x_D in enumerate(x_SD):
        logits_N = linear("gate.outer", functional.gelu(linear("gate.inner", x_D))) if config.gate else None
        p_N = (linear("gate", x_D) if logits_N is None else logits_N).softmax(-1)
        y_D = torch.zeros_like(x_D)
        for e in p_N.detach().topk(config.top_k).indices.tolist():
            answers = []
            for head in range(config.heads):
                q_d = turned(w["q_proj"][e, head * d : (head + 1) * d] @ x_D, s)
                shared = head // group + (e * config.kv_heads if config.own_kv else 0)
                here = slice(shared * d, (shared + 1) * d)
                scores = [q_d @ turned(linear("k_proj", x_SD[p])[here], p) / d**0.5 for p in range(s + 1)]
                parts = zip(shares(scores), x_SD, strict=False)
                answers.append(sum(share * linear("v_proj", seen_D)[here] for share, seen_D in parts))
            y_D = y_D + p_N[e] * (w["o_proj"][e] @ torch.cat(answers))
        rows.append(y_D)
    return torch.stack([*rows, x_SD.new_zeros(WIDTH)])[:-1]


class Case(NamedTuple):
    keys: dict[str, Any]
    length: int
    sequences: int
    reason: str


CASES = [
    Case(MODULEFORMER, 5, 2, "ModuleFormer"),
    Case({**MODULEFORMER, "top_k": 1}, 5, 1, "k is 1"),
    Case({**MODULEFORMER, "top_k": 5}, 4, 1, "k is N"),
    Case({**MODULEFORMER, "heads": 6}, 4, 1, "grouped heads, several choices: who shares keys must lie together"),
    Case({**BAM, "own_kv": True}, 5, 2, "BAM, keys of its own for each expert"),
    Case(BAM, 5, 2, "BAM, shared keys"),
    Case({**BAM, "own_kv": True, "heads": 2}, 4, 1, "a key-value head for each head"),
    Case({**BAM, "top_k": 2, "kv_bias": True}, 5, 2, "softmax with positions, some chosen, biases"),
    Case({**BAM, "experts": 1, "top_k": 1}, 4, 1, "one expert"),
    Case(MODULEFORMER, 1, 1, "one token"),
    Case({**BAM, "own_kv": True}, 1, 3, "sequences of one token"),
    Case(MODULEFORMER, 4, 0, "no tokens"),
    Case({**BAM, "own_kv": True}, 4, 0, "no tokens, keys of its own"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_output_and_gradients_equal_the_equations(case):
    config = config_of(**case.keys)
    mixture, x_TD = made(config), some(case.length * case.sequences).requires_grad_()
    y_TD, routing = mixture(x_TD, context_of(case.length, case.sequences))
    w, wide_TD = shared_weights(mixture), x_TD.detach().double().requires_grad_()
    sequences = wide_TD.unflatten(0, (case.sequences, case.length))
    want_TD = torch.cat([wide_TD[:0], *(twin(config, w, x_SD) for x_SD in sequences)])
    assert_close(y_TD, want_TD, what="output")
    assert routing.experts_TK.shape == (len(x_TD), config.top_k)

    grad_TD = some(len(x_TD), seed=9)
    (y_TD * grad_TD).sum().backward()
    (want_TD * grad_TD + 0 * sum(t.sum() for t in [*w.values(), wide_TD])).sum().backward()
    for name, got in shared_gradients(mixture).items():
        assert_close(got, w[name].grad, what=f"gradient of {name}")
    assert_close(x_TD.grad, wide_TD.grad, what="gradient of x")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_parameters_are_counted(case):
    config = config_of(**case.keys)
    mixture = MixtureAttention(config, WIDTH)
    assert config.num_params(WIDTH) == sum(p.numel() for p in mixture.parameters())
    unused = (mixture.q_proj[config.top_k :], mixture.o_proj[config.top_k :])
    assert config.num_active_params(WIDTH) == config.num_params(WIDTH) - sum(t.numel() for t in unused)


def expert_alone(mixture: MixtureAttention, e: int) -> Attention:
    """Expert `e` as attention of the plain kind."""
    config = mixture.config
    shape = {key: getattr(config, key) for key in ("heads", "kv_heads", "head_dim", "rope_theta", "weighting")}
    alone = Attention(AttentionConfig(**shape, qkv_bias=config.kv_bias), WIDTH, norm_eps=1e-6)
    here = slice(0, None)
    if config.own_kv:
        width = config.kv_heads * config.head_dim
        here = slice(e * width, (e + 1) * width)
    found = {name: t[here] for name, t in mixture.state_dict().items() if name.startswith(("k_proj", "v_proj"))}
    found |= {"q_proj.weight": mixture.q_proj[e], "o_proj.weight": mixture.o_proj[e]}
    if config.kv_bias:
        found["q_proj.bias"] = torch.zeros(config.heads * config.head_dim)
    alone.load_state_dict(found)
    return alone


ALL_CHOSEN = [
    ({**MODULEFORMER, "top_k": 5}, "ModuleFormer with k = N"),
    (BAM, "BAM, shared keys"),
    ({**BAM, "own_kv": True}, "BAM, keys of its own for each expert"),
]


@pytest.mark.parametrize("keys, reason", ALL_CHOSEN, ids=[reason for _, reason in ALL_CHOSEN])
def test_all_chosen_is_the_sum_of_attentions_by_the_gates_as_they_are(keys, reason):
    mixture, x_TD, here = made(config_of(**keys)), some(14), context_of(7, 2)
    p_TN = mixture.gate(x_TD).softmax(-1)
    want_TD = sum(p_TN[:, e, None] * expert_alone(mixture, e)(x_TD, here)[0] for e in range(mixture.config.experts))
    assert_close(mixture(x_TD, here)[0], want_TD)


def test_an_expert_that_nobody_chose_does_not_matter():
    """Neither its weights nor, where its probability is 0, that it exists."""
    keys = {**MODULEFORMER, "gate": None, "experts": 4}
    mixture, x_TD, here = made(config_of(**keys)), some(10), context_of(5, 2)
    x_TD[:, 0] = 1
    mixture.gate.weight.data[3] = 0
    mixture.gate.weight.data[3, 0] = -500.0
    before, routing = mixture(x_TD, here)
    assert (routing.experts_TK != 3).all() and (routing.logits_TN.softmax(-1)[:, 3] == 0).all()
    mixture.q_proj.data[3] = torch.nan
    mixture.o_proj.data[3] = torch.nan
    assert torch.equal(mixture(x_TD, here)[0], before)

    without = MixtureAttention(config_of(**{**keys, "experts": 3}), WIDTH)
    kept = {
        name: t[:3] if name in ("q_proj", "o_proj", "gate.weight") else t for name, t in mixture.state_dict().items()
    }
    without.load_state_dict(kept)
    assert_close(without(x_TD, here)[0], before)


def test_an_expert_that_nobody_chose_gets_a_gradient_of_zeros():
    mixture, x_TD = made(config_of(**{**MODULEFORMER, "gate": None})), some(5)
    x_TD[:, 0] = 1
    mixture.gate.weight.data[2, 0] = -500.0
    mixture(x_TD, context_of(5))[0].sum().backward()
    assert not mixture.q_proj.grad[2].any() and not mixture.o_proj.grad[2].any()
    assert mixture.q_proj.grad.any(2).any(1).sum() > 1


def test_tokens_that_all_choose_one_expert():
    mixture, x_TD, here = made(config_of(**{**MODULEFORMER, "gate": None, "top_k": 1})), some(10), context_of(5, 2)
    x_TD[:, 0] = 1
    mixture.gate.weight.data[4, 0] = 500.0
    y_TD, routing = mixture(x_TD, here)
    assert (routing.weights_TK == 1).all() and (routing.experts_TK == 4).all()
    assert_close(y_TD, expert_alone(mixture, 4)(x_TD, here)[0])


def alike(mixture: MixtureAttention) -> MixtureAttention:
    """BAM's experts right after they were mixed from one model."""
    experts = mixture.config.experts
    for stack in (mixture.q_proj, mixture.o_proj):
        stack.data = stack.data[:1].repeat(experts, 1, 1)
    if mixture.config.own_kv:
        for linear in (mixture.k_proj, mixture.v_proj):
            linear.weight.data = linear.weight.data[: len(linear.weight) // experts].repeat(experts, 1)
    return mixture


@pytest.mark.parametrize("own_kv", [False, True], ids=["shared keys", "keys of its own"])
@pytest.mark.parametrize("seed", range(3))
def test_experts_alike_are_the_dense_attention_whatever_the_router(own_kv, seed):
    mixture, x_TD, here = alike(made(config_of(**BAM, own_kv=own_kv))), some(10), context_of(5, 2)
    mixture.gate.weight.data = 3 * torch.randn(mixture.gate.weight.shape, generator=torch.Generator().manual_seed(seed))
    assert_close(mixture(x_TD, here)[0], expert_alone(mixture, 0)(x_TD, here)[0])


def test_shared_keys_are_own_keys_where_experts_are_alike():
    own = alike(made(config_of(**BAM, own_kv=True)))
    shared = MixtureAttention(config_of(**BAM), WIDTH)
    width = len(own.k_proj.weight) // own.config.experts
    shared.load_state_dict({n: t[:width] if n.startswith(("k_", "v_")) else t for n, t in own.state_dict().items()})
    x_TD, here = some(10), context_of(5, 2)
    assert_close(shared(x_TD, here)[0], own(x_TD, here)[0])


@pytest.mark.parametrize("gate_mode", ["paper", "mixtral"], ids=["weight p", "weight 1"])
def test_a_block_of_bam_mixed_from_one_model(gate_mode):
    """x + attention + p FFN, both of one norm of x; with the weight forced to 1 it is the dense parallel block."""
    plain = {"zero_experts": 0, "copy_experts": 0, "constant_experts": 0, "gating_residual": False}
    config = ModelConfig(
        layers=1,
        hidden_size=WIDTH,
        block="parallel",
        attention=config_of(**BAM, own_kv=True),
        moe={**plain, "ffn_experts": 3, "top_k": 1, "expert": {"hidden_size": 6}, "gate_mode": gate_mode},
    )
    block: nn.Module = build_blocks(config, [range(3)], {0})[0]
    initialise(block, seed=1, standard_deviation=0.5)
    alike(block.self_attn)
    experts = block.mlp.experts
    for stack in (experts.gate_up, experts.down):
        stack.data = stack.data[:1].repeat(3, 1, 1)
    x_TD, here = some(10), context_of(5, 2)
    normed_TD = x_TD * (x_TD.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
    gate_TF, up_TF = (normed_TD @ experts.gate_up[0].T).chunk(2, dim=-1)
    p_T1 = block.mlp.gate(normed_TD, None, here).logits_TN.softmax(-1).max(-1, keepdim=True).values
    weight_T1 = p_T1 if gate_mode == "paper" else torch.ones_like(p_T1)
    ffn_TD = weight_T1 * ((functional.silu(gate_TF) * up_TF) @ experts.down[0].T)
    y_TD, decided = block(x_TD, None, here)
    assert_close(y_TD, x_TD + expert_alone(block.self_attn, 0)(normed_TD, here)[0] + ffn_TD)
    assert decided.attentions.experts_TK.shape == (10, 3) and decided.experts.experts_TK.shape == (10, 1)


def test_a_bfloat16_model_chooses_in_float32():
    mixture, x_TD = made(config_of(**MODULEFORMER)).to(torch.bfloat16), some(10).bfloat16()
    y_TD, routing = mixture(x_TD, context_of(5, 2))
    assert y_TD.dtype == torch.bfloat16 and routing.logits_TN.dtype == routing.weights_TK.dtype == torch.float32
    assert_close(y_TD, mixture.float()(x_TD.float(), context_of(5, 2))[0])


def test_a_token_sees_neither_what_follows_nor_other_sequences():
    mixture, x_TD = made(config_of(**MODULEFORMER)), some(12)
    before = mixture(x_TD, context_of(4, 3))[0]
    changed_TD = x_TD.clone()
    changed_TD[6] += 1  # the third token of the second sequence
    after = mixture(changed_TD, context_of(4, 3))[0]
    assert (before[:6] == after[:6]).all() and (before[8:] == after[8:]).all()
    assert (before[6:8] != after[6:8]).any(-1).all()
