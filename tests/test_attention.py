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
