"""Attention equals Hugging Face's Llama with the same weights; rotary positions and causality have their properties."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_close
from tiny import context_of

from expertmesh.system.model.attention import Attention
from expertmesh.system.model.attention_config import AttentionConfig
from expertmesh.system.model.rotary import rotate
from expertmesh.system.model.weights import initialise

WIDTH = 24


def made(config: AttentionConfig) -> Attention:
    attention = Attention(config, WIDTH, norm_eps=1e-6)
    initialise(attention, 1, 0.3)
    return attention


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [
    (AttentionConfig(heads=6, kv_heads=2, head_dim=8), 11, "grouped queries, heads wider together than the model"),
    (AttentionConfig(heads=3, kv_heads=3, head_dim=8), 5, "a key-value head for each head"),
    (AttentionConfig(heads=4, kv_heads=1, head_dim=6, rope_theta=50.0), 7, "one key-value head, another theta"),
    (AttentionConfig(heads=2, kv_heads=1, head_dim=4), 1, "one token a sequence"),
]


@pytest.mark.parametrize("config, length, reason", SHAPES, ids=[reason for *_, reason in SHAPES])
def test_equals_llama(config, length, reason):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    llama_config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",
    )
    ours, theirs = made(config), LlamaAttention(llama_config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())  # the names are the same
    x_BSD, sequences = some(3, length, WIDTH), 3
    positions_BS = torch.arange(length).expand(sequences, -1)
    hidden_BS = torch.full((length, length), -torch.inf).triu(1).expand(sequences, 1, -1, -1)
    want_BSD, _ = theirs(x_BSD, LlamaRotaryEmbedding(llama_config)(x_BSD, positions_BS), attention_mask=hidden_BS)
    got_TD = ours(x_BSD.flatten(0, 1), context_of(length, sequences))[0]
    assert_close(got_TD, want_BSD.flatten(0, 1))


def test_rotation_keeps_position_zero_and_depends_on_distance_alone():
    q_THd, k_THd = some(1, 2, 8, seed=1), some(1, 2, 8, seed=2)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        turned_q, turned_k = (rotate(t, torch.tensor([at]), 100.0) for t, at in ((q_THd, query_at), (k_THd, key_at)))
        return (turned_q * turned_k).sum(-1)

    assert torch.equal(rotate(q_THd, torch.tensor([0]), 100.0), q_THd)
    assert_close(score(9, 4), score(5, 0))
    assert (score(9, 4) - score(9, 5)).abs().max() > 1e-3


def test_rotation_of_bfloat16_is_computed_in_float32():
    x_THd, positions_T = some(4, 2, 8).to(torch.bfloat16), torch.tensor([0, 1, 500, 4001])
    turned = rotate(x_THd, positions_T, 10_000.0)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x_THd.float(), positions_T, 10_000.0).to(torch.bfloat16))


def test_a_token_sees_neither_what_follows_nor_other_sequences():
    attention, x_TD = made(SHAPES[0][0]), some(12, WIDTH)
    before = attention(x_TD, context_of(4, 3))[0]
    changed_TD = x_TD.clone()
    changed_TD[6] += 1  # the third token of the second sequence
    after = attention(changed_TD, context_of(4, 3))[0]
    differs_T = (before != after).any(-1)
    assert differs_T.tolist() == [False] * 6 + [True] * 2 + [False] * 4


def test_no_sequences():
    attention = made(SHAPES[0][0])
    x_TD = torch.empty(0, WIDTH, requires_grad=True)
    y_TD, _ = attention(x_TD, context_of(4, 0))
    assert y_TD.shape == (0, WIDTH)
    y_TD.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in attention.parameters())


GATED = {"heads": 6, "kv_heads": 2, "head_dim": 4}
GATES = pytest.mark.parametrize("output_gate", ["head", "element"])


def gated_and_plain(output_gate: str) -> tuple[Attention, Attention]:
    """The same attention with a gate and without."""
    gated = made(AttentionConfig(**GATED, output_gate=output_gate))
    plain = made(AttentionConfig(**GATED))
    plain.load_state_dict({name: t for name, t in gated.state_dict().items() if not name.startswith("gate_proj")})
    return gated, plain


@GATES
def test_a_gate_of_zeros_halves_the_answer(output_gate):
    gated, plain = gated_and_plain(output_gate)
    gated.gate_proj.weight.data.zero_()
    x_TD, here = some(10, WIDTH), context_of(5, 2)
    assert torch.equal(gated(x_TD, here)[0], plain(x_TD, here)[0] / 2)


@GATES
def test_an_open_gate_is_no_gate(output_gate):
    gated, plain = gated_and_plain(output_gate)
    x_TD, here = some(10, WIDTH), context_of(5, 2)
    x_TD[:, 0] = 1
    gated.gate_proj.weight.data.zero_()
    gated.gate_proj.weight.data[:, 0] = 1e4
    assert torch.equal(gated(x_TD, here)[0], plain(x_TD, here)[0])


def test_a_gate_of_heads_is_a_gate_of_elements_with_repeated_rows():
    heads, _ = gated_and_plain("head")
    elements = made(AttentionConfig(**GATED, output_gate="element"))
    repeated = heads.gate_proj.weight.detach().repeat_interleave(GATED["head_dim"], 0)
    elements.load_state_dict({**heads.state_dict(), "gate_proj.weight": repeated})
    x_TD, here = some(10, WIDTH), context_of(5, 2)
    assert_close(elements(x_TD, here)[0], heads(x_TD, here)[0])


@GATES
def test_a_gate_is_the_sigmoid_of_the_querying_token_alone(output_gate):
    """What the gate multiplies is the answer of each head, before the heads are mixed (position G1 of the paper)."""
    gated, plain = gated_and_plain(output_gate)
    for attention in (gated, plain):
        attention.o_proj.weight.data = torch.eye(WIDTH)
    x_TD, here = some(5, WIDTH), context_of(5)
    repeats = GATED["head_dim"] if output_gate == "head" else 1
    gates_TX = (x_TD[3] @ gated.gate_proj.weight.T).sigmoid().repeat_interleave(repeats)
    for tokens_TD in (x_TD, x_TD + torch.tensor([1.0, -2, 3, 0, 1])[:, None]):  # all others change, and so do answers
        assert_close(gated(tokens_TD, here)[0][3], plain(tokens_TD, here)[0][3] * gates_TX)


@GATES
def test_every_weight_of_gated_attention_learns(output_gate):
    gated, _ = gated_and_plain(output_gate)
    gated(some(5, WIDTH), context_of(5))[0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in gated.parameters())
