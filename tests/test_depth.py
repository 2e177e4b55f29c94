"""Mixture of depths: who goes through, that the others are untouched, and all of it against a loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bites import Bite, attend_of, cache_for, positions_of
from numerics import assert_close
from tiny import VOCAB_SIZE, context_of, tiny_model, training_step
from twin import Weights, attention, moe, rms_norm, shared_gradients, shared_weights

from expertmesh.parallel.dispatchers import LocalDispatcher
from expertmesh.system.model.attend import CausalAttend
from expertmesh.system.model.block import build_blocks
from expertmesh.system.model.config import DepthConfig, ModelConfig
from expertmesh.system.model.context import Context
from expertmesh.system.model.depth import DepthRouted, largest, largest_ref
from expertmesh.system.model.transformer import Transformer, shards
from expertmesh.system.model.weights import initialise
from expertmesh.system.serve.kv_cache import PagedAttend

WIDTH, LENGTH, SEQUENCES = 16, 9, 3


def config_of(moe: dict[str, Any] | None = None, **depth: Any) -> ModelConfig:
    free = {"gating_residual": False, **(moe or {})}
    return tiny_model(layers=1, hidden_size=WIDTH, moe=free, depth={"layers": [0], **depth})


def layer_of(config: ModelConfig) -> DepthRouted:
    block = build_blocks(config, shards(config, 0, 1), {0})[0]
    initialise(block, 3, 0.4)
    return block


def tokens(sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(sequences * length, WIDTH, generator=torch.Generator().manual_seed(seed))


def serving(sequences: int = SEQUENCES, length: int = LENGTH) -> Context:
    return context_of(length, sequences)


def training(sequences: int = SEQUENCES, length: int = LENGTH) -> Context:
    return context_of(length, sequences, training_step(length, range(sequences)))


BOTH = pytest.mark.parametrize("context_for", [training, serving], ids=["training", "serving"])


@BOTH
def test_with_every_token_through_and_p_of_1_it_is_the_block(context_for):
    layer, x_TD = layer_of(config_of(kept=1.0)), tokens()
    layer.depth_router.forward = lambda n_TD: n_TD.new_tensor([-100.0, 100.0]).expand(len(n_TD), 2)
    y_TD, decided = layer(x_TD, None, context_for())
    plain_TD, plain = layer._through[0](x_TD, None, context_for())
    assert decided.depth.chosen_T.all() and torch.equal(y_TD, plain_TD)
    assert torch.equal(decided.experts.experts_TK, plain.experts.experts_TK)


@pytest.mark.parametrize("kept, count", [(0.5, 5), (0.2, 2), (0.01, 1)], ids=["half", "a fifth", "one each"])
def test_who_goes_past_is_unchanged_bit_for_bit(kept, count):
    layer, x_TD = layer_of(config_of(kept=kept)), tokens()
    y_TD, decided = layer(x_TD, None, training())
    chosen_T = decided.depth.chosen_T
    assert chosen_T.view(SEQUENCES, LENGTH).sum(1).tolist() == [count] * SEQUENCES
    assert torch.equal(y_TD[~chosen_T], x_TD[~chosen_T])
    assert (y_TD[chosen_T] != x_TD[chosen_T]).any(dim=1).all()
    assert len(decided.experts.experts_TK) == count * SEQUENCES, "only they choose experts"


@BOTH
def test_each_sequence_chooses_by_itself(context_for):
    layer, x_TD = layer_of(config_of()), tokens()
    together_TD, decided = layer(x_TD, None, context_for())
    for s in range(SEQUENCES):
        mine = slice(s * LENGTH, (s + 1) * LENGTH)
        alone_TD, by_itself = layer(x_TD[mine], None, context_for(1))
        assert torch.equal(by_itself.depth.chosen_T, decided.depth.chosen_T[mine])
        assert_close(alone_TD, together_TD[mine])


def test_who_goes_past_is_not_seen():
    layer, x_TD = layer_of(config_of(threshold=0.3)), tokens(1)
    y_TD, decided = layer(x_TD, None, serving(1))
    chosen_T = decided.depth.chosen_T
    assert 2 < int(chosen_T.sum()) < LENGTH
    for t in range(LENGTH):
        changed_TD = x_TD.clone()
        changed_TD[t, 0] += 0.01
        other_TD, again = layer(changed_TD, None, serving(1))
        assert torch.equal(again.depth.chosen_T, chosen_T)
        others_T = torch.arange(LENGTH) != t
        seen = not torch.equal(other_TD[others_T], y_TD[others_T])
        assert seen == bool(chosen_T[t] and chosen_T[t + 1 :].any()), f"token {t}"


def twin(config: ModelConfig, w: Weights, x_SD: torch.Tensor, chosen: list[int]) -> torch.Tensor:
    """One sequence: the chosen tokens as a sequence of their own, at the positions that they have."""
    norm_D, eps = w["input_layernorm.weight"], config.norm_eps
    p_S = (rms_norm(x_SD, norm_D, eps) @ w["depth_router.weight"].T).softmax(-1)[:, 1]
    x_RD = x_SD[chosen]
    y_RD = x_RD + attention(config, w, "self_attn.", rms_norm(x_RD, norm_D, eps), chosen)
    y_RD = y_RD + moe(config.moe, w, "mlp.", rms_norm(y_RD, w["post_attention_layernorm.weight"], eps), None)[0]
    answers = list(x_SD)
    for row, t in enumerate(chosen):
        answers[t] = x_SD[t] + p_S[t] * (y_RD[row] - x_SD[t])
    return torch.stack(answers)


@BOTH
def test_output_and_gradients_equal_the_equations(context_for):
    config = config_of()
    layer, x_TD, grad_TD = layer_of(config), tokens().requires_grad_(), tokens(seed=5)
    y_TD, decided = layer(x_TD, None, context_for())
    y_TD.backward(grad_TD)

    w, wide_TD = shared_weights(layer), x_TD.detach().double().requires_grad_()
    chosen_BS = decided.depth.chosen_T.view(SEQUENCES, LENGTH)
    answers = [
        twin(config, w, x_SD, chosen_S.nonzero()[:, 0].tolist())
        for x_SD, chosen_S in zip(wide_TD.split(LENGTH), chosen_BS, strict=True)
    ]
    (torch.cat(answers) * grad_TD.double() + 0 * sum(t.sum() for t in w.values())).sum().backward()
    assert_close(y_TD, torch.cat(answers), what="output")
    assert_close(x_TD.grad, wide_TD.grad, max_error=2e-4, rms_error=2e-5, what="gradient of x")
    for name, gradient in shared_gradients(layer).items():
        assert_close(gradient, w[name].grad, max_error=2e-4, rms_error=2e-5, what=f"gradient of {name}")
    assert layer.depth_router.weight.grad.abs().max() > 0.1, "the weight p alone teaches the router"


# Each row: scores, length of a sequence, how many go through, who does.
CHOICES: list[tuple[list[float], int, int, list[int], str]] = [
    ([0.9, 0.2, 0.6, 0.6, 0.1, 0.7, 0.3, 0.6], 8, 4, [0, 2, 3, 5], "equal ones by position"),
    ([1.0, 1.0, 1.0, 1.0], 4, 2, [0, 1], "all equal"),
    ([1.0, 2.0, 9.0, 8.0], 2, 1, [1, 2], "sequences do not compete"),
    ([1.0, 2.0], 2, 2, [0, 1], "all of them"),
    ([-5.0], 1, 1, [0], "one token"),
    ([], 3, 2, [], "no tokens"),
]


@pytest.mark.parametrize("scores, length, count, chosen, reason", CHOICES, ids=[row[-1] for row in CHOICES])
def test_the_largest_go_through(scores, length, count, chosen, reason):
    for choose in (largest, largest_ref):
        assert choose(torch.tensor(scores), length, count).nonzero()[:, 0].tolist() == chosen


@pytest.mark.parametrize("length, count", [(7, 3), (1, 1), (16, 1)])
def test_the_largest_equal_their_definition(length, count):
    scores_T = torch.randint(0, 5, (4 * length,), generator=torch.Generator().manual_seed(length)).float()
    assert torch.equal(largest(scores_T, length, count), largest_ref(scores_T, length, count))


def test_whole_shares_are_not_rounded_up():
    kept = [DepthConfig(layers=[0], kept=share).tokens(10) for share in (0.7, 0.3, 0.1, 0.01, 1.0)]
    assert kept == [7, 3, 1, 1, 10]  # 0.7 * 10 is 7.000000000000001 in floats


@BOTH
@pytest.mark.parametrize("sequences, length", [(0, 5), (1, 1), (3, 1)], ids=["no tokens", "one token", "one each"])
def test_few_tokens(context_for, sequences, length):
    layer, x_TD = layer_of(config_of()), tokens(sequences, length)
    y_TD, decided = layer(x_TD, None, context_for(sequences, length))
    assert y_TD.shape == x_TD.shape and torch.isfinite(y_TD).all()
    assert context_for is serving or decided.depth.chosen_T.all(), "at least one of each sequence goes through"
    y_TD.sum().backward()


def test_nobody_through():
    layer, x_TD = layer_of(config_of(threshold=1.0)), tokens()
    y_TD, decided = layer(x_TD, None, serving())
    assert torch.equal(y_TD, x_TD) and not decided.depth.chosen_T.any()


def test_capacity_counts_the_tokens_that_go_through():
    """4 FFN experts and no others, k = 1: an expert serves a quarter of the 4 tokens of 8 that are there."""
    alone = {"constant_experts": 0, "copy_experts": 0, "zero_experts": 0, "top_k": 1}
    layer = layer_of(config_of({**alone, "capacity": {"factor": 1.0, "order": "random"}}))
    _, decided = layer(tokens(2, 8), None, training(2, 8))
    served = decided.experts.experts_TK.view(2, 4)
    assert ((served[..., None] == torch.arange(4)).sum(1) <= 1).all() and decided.experts.dropped_slots > 0


@pytest.mark.parametrize("shared", [True, False], ids=["one router", "a router for each layer"])
def test_routers(shared):
    changes = {"gating_residual": False}
    config = tiny_model(moe=changes, depth={"layers": [0, 2], "shared_router": shared})
    layers = Transformer(config).layers
    assert [isinstance(layer, DepthRouted) for layer in layers] == [True, False, True]
    assert (layers[0].depth_router is layers[2].depth_router) == shared
    plain = {name for name, _ in Transformer(tiny_model(moe=changes)).named_parameters()}
    added = {name for name, _ in Transformer(config).named_parameters()} - plain
    assert added == {f"layers.{layer}.depth_router.weight" for layer in ([0] if shared else [0, 2])}


BITES = [([9], "a prompt"), ([4, 1, 1, 3], "in bites"), ([1] * 9, "token by token")]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("bites, reason", BITES, ids=[reason for _, reason in BITES])
@torch.no_grad()
def test_cached_decoding_equals_a_full_pass(bites, reason, window):
    attention = {"heads": 4, "kv_heads": 2, "head_dim": 8, "sliding_window": window}
    config = tiny_model(
        moe={"gating_residual": False}, attention=attention, depth={"layers": [0, 1], "shared_router": False}
    )
    model = Transformer(config)
    initialise(model, 3, 0.4)
    tokens_T = torch.randint(0, VOCAB_SIZE, (9,), generator=torch.Generator().manual_seed(1))
    cache = cache_for(config)
    cache.seen_LPB.fill_(True)  # what an earlier request left behind

    def run(attend: CausalAttend | PagedAttend, start: int, end: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        context = Context(torch.arange(start, end), attend, LocalDispatcher())
        hidden_TD, decisions = model(tokens_T[start:end], context)
        return hidden_TD, [decided.depth.chosen_T for decided in decisions if decided.depth]

    whole_TD, chosen = run(CausalAttend(9), 0, 9)
    assert all(0 < int(chosen_T.sum()) < 9 for chosen_T in chosen), "some go through, some past"
    start = 0
    for length in bites:
        hidden_TD, _ = run(attend_of(cache, [Bite(1, start, length)]), start, start + length)
        assert_close(hidden_TD, whole_TD[start : start + length], what=f"from token {start}")
        start += length
    pages, offsets = zip(*positions_of(1, 9), strict=True)
    assert torch.equal(cache.seen_LPB[:2, list(pages), list(offsets)], torch.stack(chosen))


def test_parts_have_one_name():
    layer = layer_of(config_of())
    names = [name for name, _ in layer.named_children()]
    assert names == ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "depth_router"]
    assert layer.mlp is layer._through[0].mlp
